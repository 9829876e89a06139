/* Reads, pins, HORIZON and the reuse of memory.

   Models      store.commit.StoreWriter (publish, _rest, _reclaim), store.pins (Pins._acquire, release, PinnedVersions.needs),
               store.reader.StoreReader (get, _pin, find).
   Processes   A writer that commits VERSIONS times and reclaims whenever it likes, up to any version; a reader that again
               and again reads without a pin, or takes a pin (exact, or the floor), reads under it, and lets go.
   Memory      TSO: every process has a store buffer, a queue that empties at any time; a load sees memory, for nobody
               loads here what it stores; a fence waits until the buffer is empty.
   Abstracted  The state has two keys, changed in turn; a record names their two cells, without nodes between. A cell
               holds the version that wrote it. The ring has RING records, there are CELLS cells. One pin word.
               Death, takeover (`recover`) and CLAIMED are not in it.
   Properties  A read that is not done again, and every read under a pin, sees the cells of its version (assert).     */

/* Mutants */
#define NO_READER_FENCE   1  /* H2 is missing: HORIZON is loaded while the pin is still in the buffer */
#define NO_WRITER_FENCE   2  /* U2 is missing: PINS is loaded while HORIZON is still in the buffer */
#define PINS_FIRST        3  /* U2 ahead of U1 */
#define NO_G3             4  /* a read without a pin looks at HORIZON ahead of the memory, not behind it */
#define NO_C3             5  /* the ring's record is used again without raising HORIZON */
#define C4_BEFORE_C3      6  /* the record is overwritten, then HORIZON raised */
#define C5_BEFORE_C4      7  /* VERSION ahead of its record */
#define NO_SECOND_LOOK    8  /* a pin's record is loaded, and HORIZON is not looked at again */
#define PIN_IS_BIRTH      9  /* a pin keeps only the cells of the very version */

#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef VERSIONS
#define VERSIONS 5
#endif
#define RING   3
#define CELLS  5
#define LIVE   0                                  /* in `replaced` */
#define FREE   255

mtype = { CELL, RECORD, HORIZON, VERSION };

/* Shared memory */
byte cell[CELLS];
byte record[RING] = 1;                            /* the cells of both keys, as one word: pair(0, 1) */
byte horizon, version, pin;                       /* pin: version + 1 */
bool is_floor;                                    /* which of its words the reader pins with */
chan stores = [3] of { mtype, byte, byte };       /* the writer's buffer: which word, value */
chan ours   = [1] of { byte };                    /* the reader's: pin */

#define pair(a, b)  ((a) * 8 + (b))
#define born(key, v) ((v) == 0 -> 0 : ((v) % 2 == (key) -> (v) : (v) - 1))     /* 0 was there from the start */

active proctype Memory() {
    byte index, value;
end:do
    :: ours?pin
    :: atomic { stores?CELL, index, value -> cell[index] = value; index = 0; value = 0 }
    :: atomic { stores?RECORD, index, value -> record[index] = value; index = 0; value = 0 }
    :: atomic { stores?HORIZON, index, value -> horizon = value; value = 0 }
    :: atomic { stores?VERSION, index, value -> version = value; value = 0 }
    od
}

/* The writer */

#if MUTANT == PIN_IS_BIRTH
#define needs(c)  (pins > 0 && birth[c] == pins - 1)
#else
#define needs(c)  (pins > 0 && (is_floor -> replaced[c] > pins - 1 : birth[c] <= pins - 1 && pins - 1 < replaced[c]))
#endif

inline store_record() { stores!RECORD, v % RING, pair(at[0], at[1]) }

inline raise_horizon(h) { if :: (h) > mine -> mine = (h); stores!HORIZON, 0, mine :: else fi }

inline commit() {
    atomic { v++; i = 0; do :: replaced[i] != FREE -> i++ :: else -> break od;
             replaced[at[v % 2]] = v; at[v % 2] = i; replaced[i] = LIVE; birth[i] = v };
    atomic { stores!CELL, i, v; i = 0 };          /* C1 */
#if MUTANT == C4_BEFORE_C3
    store_record();
    if :: v >= RING -> raise_horizon(v - RING + 1) :: else fi;
#else
#if MUTANT != NO_C3
    if :: v >= RING -> raise_horizon(v - RING + 1) :: else fi;            /* C3 */
#endif
#if MUTANT != C5_BEFORE_C4
    store_record();                               /* C4 */
#endif
#endif
    stores!VERSION, 0, v;                         /* C5 */
#if MUTANT == C5_BEFORE_C4
    store_record();
#endif
}

inline reclaim() {
    atomic { select_h = 1; do :: select_h < v -> select_h++ :: break od };
#if MUTANT == PINS_FIRST
    pins = pin;
    raise_horizon(select_h);
    empty(stores);
#else
    raise_horizon(select_h);                      /* U1 */
#if MUTANT != NO_WRITER_FENCE
    empty(stores);                                /* U2 */
#endif
    pins = pin;
#endif
    atomic { i = 0;                               /* U3 */
        do
        :: i < CELLS ->
            if
            :: replaced[i] != LIVE && replaced[i] <= select_h && !needs(i) -> replaced[i] = FREE; birth[i] = 0
            :: else
            fi;
            i++
        :: else -> break
        od;
        i = 0; pins = 0; select_h = 0 }
}

#define some_free (replaced[0] == FREE || replaced[1] == FREE || replaced[2] == FREE || replaced[3] == FREE || replaced[4] == FREE)
#define some_rest (v > 0 && (rests(0) || rests(1) || rests(2) || rests(3) || rests(4)))
#define rests(c)  (replaced[c] != FREE && replaced[c] != LIVE)

active proctype Writer() {
    byte v, i, mine, pins, select_h, at[2], birth[CELLS], replaced[CELLS];
    atomic { at[1] = 1; replaced[2] = FREE; replaced[3] = FREE; replaced[4] = FREE };
end:do
    :: v < VERSIONS && some_free -> commit()
    :: v < VERSIONS && some_rest -> reclaim()
    od
}

/* The reader */

inline check(key, where) { assert(cell[where] == born(key, number)) }

active proctype Reader() {
    byte number, a, b, root;
end:do
    :: number = version;                          /* G1, without a pin */
#if MUTANT == NO_G3
        if :: horizon > number -> goto again :: else fi;
#endif
        root = record[number % RING];             /* G2 */
        a = cell[root / 8];
        b = cell[root % 8];
#if MUTANT != NO_G3
        if :: horizon > number -> goto again :: else fi;      /* G3 */
#endif
        atomic { assert(a == born(0, number) && b == born(1, number)) };
        goto again
    :: number = version;                          /* with a pin */
        atomic { if :: is_floor = true :: is_floor = false fi; ours!number + 1 };             /* H1 */
#if MUTANT != NO_READER_FENCE
        empty(ours);                              /* H2 */
#endif
        if :: horizon > number -> goto unpin :: else fi;      /* H3 */
        root = record[number % RING];
#if MUTANT != NO_SECOND_LOOK
        if :: horizon > number -> goto unpin :: else fi;
#endif
        do
        :: check(0, root / 8)
        :: check(1, root % 8)
        :: break
        od;
unpin:  ours!0;
        empty(ours);                              /* it pins again only some time later */
again:  atomic { number = 0; a = 0; b = 0; root = 0 }
    od
}
