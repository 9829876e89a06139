/* From cell to cell: who knows where a key's cell lay follows NEXT instead of walking from the root.

   Models      store.commit.StoreWriter (commit, recover, _reclaim), store.reader.StoreReader.follow,
               coordinator.takeover.take_over, client.state.FlowState.__getitem__.
   Processes   A writer that replaces the cell of one key, deletes it, or commits something else; that reclaims whenever it
               likes, up to any version; that is killed between any two of its steps, DEATHS times, and has a successor
               each time. A reader that now and then walks, and else follows, in either order.
   Memory      Sequentially consistent: the writer only stores and the reader only loads, so that the order of stores and
               that of loads, which TSO keeps, are all there is.
   Abstracted  A walk is one step, and right (pins.pml has it). Reused memory holds whatever misleads most: a cell of no
               age with a wrong value, that is the last or leads to any place. The ring's share of HORIZON is left out.
   Properties  What is followed to is what a walk from the same version finds (assert).                                */

/* Mutants */
#define LINK_LATE     1  /* C2 behind C5 */
#define NO_BIRTH      2  /* N3 is missing: the last cell is taken, committed or not */
#define NO_HORIZON    3  /* N4 does not look at HORIZON */
#define HORIZON_FIRST 4  /* N4 looks at HORIZON ahead of the copy */
#define HORIZON_NOW   5  /* N4 compares HORIZON with the version that was loaded, as a walk does */
#define NO_TAKE_BACK  6  /* a takeover leaves NEXT as it is */
#define BACK_LATE     7  /* it takes NEXT back when it has published */
#define HORIZON_LATE  8  /* a takeover raises HORIZON when it has given out memory */

#ifndef MUTANT
#define MUTANT 0
#endif

#define CELLS    3
#define VERSIONS 4
#define DEATHS   1
#define GONE     9
#define JUNK     9
#define NONE     9

/* Shared memory */
byte version = 1, horizon;
byte birth[CELLS], follower[CELLS], value[CELLS];             /* follower: place + 1, 0 or GONE */
/* Ghosts */
byte deaths;
byte root[VERSIONS + 2];                          /* the key's cell in each version, or NONE */
byte truth[VERSIONS + 2];                         /* its value: the version that wrote it, or NONE */
byte replaced[CELLS];                             /* the version that did; 0: in use; NONE: free */

inline mortal() { if :: deaths < DEATHS -> deaths++; goto dead :: true fi }

inline reuse(place) {                             /* free memory becomes part of something else */
    atomic {
        birth[place] = 0; value[place] = JUNK;
        if :: follower[place] = 0 :: follower[place] = 1 :: follower[place] = 2 :: follower[place] = GONE fi
    }
}

inline take_free() {                              /* place: a free cell, or NONE */
    place = 0;
    do :: place < CELLS && replaced[place] != NONE -> place++ :: else -> break od;
    if :: place == CELLS -> place = NONE :: else fi
}

active proctype Writer() {
    byte cell, place, other;
    atomic {
        birth[0] = 1; value[0] = 1; truth[1] = 1; root[1] = 0; truth[0] = NONE; root[0] = NONE;
        replaced[1] = NONE; replaced[2] = NONE
    }
again:
end:do
    :: version < VERSIONS ->                      /* a commit */
        atomic {
            mortal(); cell = root[version]; take_free();
            if
            :: place != NONE -> replaced[place] = 0; birth[place] = version + 1; value[place] = version + 1;  /* C1 */
                    follower[place] = 0; other = place + 1
            :: cell != NONE -> other = GONE       /* the key is deleted */
            :: other = 0                          /* another key's commit */
            fi
        };
#if MUTANT != LINK_LATE
        atomic { mortal(); if :: cell != NONE && other -> follower[cell] = other :: else fi };               /* C2 */
#endif
        atomic {
            mortal();
            if
            :: other == 0 -> root[version + 1] = cell; truth[version + 1] = truth[version]
            :: other == GONE -> root[version + 1] = NONE; truth[version + 1] = NONE
            :: else -> root[version + 1] = other - 1; truth[version + 1] = version + 1
            fi;
            if :: cell != NONE && other -> replaced[cell] = version + 1 :: else fi;
            version++                             /* C5 */
        };
#if MUTANT == LINK_LATE
        atomic { mortal(); if :: cell != NONE && other -> follower[cell] = other :: else fi };
#endif
        atomic { cell = 0; place = 0; other = 0 }
    :: atomic { horizon < version -> mortal(); horizon = version }            /* U1 */
    :: atomic { horizon < version - 1 -> mortal(); horizon++ }
    :: place = 0;                                 /* U3 */
        do
        :: place < CELLS ->
            if
            :: atomic { replaced[place] && replaced[place] <= horizon -> mortal(); replaced[place] = NONE };
                    reuse(place)
            :: place++
            fi
        :: place == CELLS -> break
        od;
        place = 0
    od;
dead:                                             /* the next coordinator */
    atomic { cell = 0; place = 0; other = 0 };
#if MUTANT != HORIZON_LATE
    horizon = version;                            /* T2 */
#endif
#if MUTANT != NO_TAKE_BACK && MUTANT != BACK_LATE
    if :: root[version] != NONE -> follower[root[version]] = 0 :: else fi;
#endif
    atomic {                                      /* what the last tree does not reach is free */
        place = 0;
        do
        :: place < CELLS -> replaced[place] = (place == root[version] -> 0 : NONE); place++
        :: else -> break
        od;
        place = 0
    };
    do
    :: place < CELLS -> if :: replaced[place] == NONE -> reuse(place) :: true fi; place++
    :: place == CELLS -> break
    od;
#if MUTANT == HORIZON_LATE
    horizon = version;
#endif
    atomic { place = 0; root[version + 1] = root[version]; truth[version + 1] = truth[version]; version++ };     /* T4 */
#if MUTANT == BACK_LATE
    if :: root[version] != NONE -> follower[root[version]] = 0 :: else fi;
#endif
    goto again
}

active proctype Reader() {
    byte since, known, last, now, born, got;
    bool passed;
    truth[1] == 1;
again:
    atomic { since = 0; last = 0; known = 0; now = 0; born = 0; got = 0; passed = false };
    do
    :: atomic { root[version] != NONE && horizon <= version ->                /* a walk */
            since = version; last = root[version]; known = truth[version] }
    :: since ->
        now = version;                            /* N1 */
        if :: now == since -> goto looked :: else fi;
        got = last;
#if MUTANT == HORIZON_FIRST
        if :: horizon > since -> goto again :: else fi;
#endif
        do
        :: atomic { born = follower[got];         /* N2 */
                    if :: born == 0 -> break :: born == GONE -> goto again :: else -> born-- fi };
#if MUTANT == NO_BIRTH
            got = born
#else
            if
            :: atomic { birth[born] > now -> break }                          /* N3 */
            :: atomic { birth[born] == now -> got = born; break }
            :: atomic { birth[born] < now -> got = born }
            fi
#endif
        od;
        if :: got != last -> atomic { known = value[got]; last = got } :: else fi;            /* N4 */
        passed = true;
#if MUTANT != NO_HORIZON && MUTANT != HORIZON_FIRST
#if MUTANT == HORIZON_NOW
        passed = horizon <= now;
#else
        passed = horizon <= since;
#endif
#endif
        atomic {
            if
            :: passed -> assert(known == truth[now]); since = now
            :: else -> goto again
            fi };
looked: atomic { now = 0; born = 0; got = 0; passed = false }
    od
}
