/* Slots that nobody has had: readers do not compare their flags, until one of them is given away.

   Models      memory.gatekeeper.GateKeeper.widen, coordinator.admission.Admission._admit,
               coordinator.takeover.take_over, memory.gate.Gate.within_reach, client.state.FlowState (__getitem__, _read, _look_up), client.client.Client.rebind.
   Processes   A coordinator that commits whatever it likes, and lets a newcomer in; it is killed between any two of its
               steps, DEATHS times, and has a successor each time. The newcomer submits one P1. A reader, that reads READS
               times. Slot 0 is everybody's, slot 1 the newcomer's; REACH is 1 to begin with.
   Memory      Sequentially consistent: the coordinator only stores and the reader only loads; the newcomer's fence is in
               flag.pml.
   Abstracted  A P1 is the version that has it. What a read finds is the version that it read. Flags of slot 0 stay down.
   Properties  A read that begins after the newcomer's submit has returned finds its P1 (assert).                    */

/* Mutants */
#define REACH_LATE      1  /* A1 behind A2 */
#define VERSION_FIRST   2  /* A3 ahead of A2 */
#define NO_VERSION      3  /* A3 is missing */
#define TOLD_EARLY      4  /* A4 ahead of A3 */
#define KEEP_ANYWAY     5  /* L7 keeps what it found, whatever EPOCH is by then */
#define REACH_FIRST     6  /* L6 takes REACH ahead of the EPOCH that it is bound for */
#define SAME_EPOCH      7  /* a takeover leaves EPOCH as it is */
#define SAME_VERSION    8  /* a takeover makes no version */
#define BLIND           9  /* L3 is missing */

#ifndef MUTANT
#define MUTANT 0
#endif

#define VERSIONS 6
#define DEATHS   1
#define READS    3

/* Shared memory */
byte version = 1, epoch, reach = 1;
bool submitted, finished;                         /* the words of slot 1 */
bool welcomed;
/* Ghosts */
byte deaths, effect;                              /* the version that has the P1; 0: none */
bool told;                                        /* the submit has returned */

inline mortal() { if :: deaths < DEATHS -> deaths++; goto dead :: true fi }

active proctype Coordinator() {
again:
end:do
    :: version < VERSIONS -> atomic { mortal(); version++ }
    :: !welcomed ->
        if
        :: reach > 1
        :: else ->
#if MUTANT != REACH_LATE
            reach = 2;                            /* A1 */
            mortal();
#endif
#if MUTANT == VERSION_FIRST
            version++;
            mortal();
#endif
            epoch++;                              /* A2 */
            mortal();
#if MUTANT == REACH_LATE
            reach = 2;
            mortal();
#endif
#if MUTANT == TOLD_EARLY
            welcomed = true;
#endif
#if MUTANT != VERSION_FIRST && MUTANT != NO_VERSION
            version++;                            /* A3 */
            mortal();
#endif
        fi;
        welcomed = true                           /* A4 */
    :: submitted && !finished ->
        if
        :: effect                                 /* its receipt says so */
        :: else -> atomic { mortal(); version++; effect = version }
        fi;
        mortal();
        finished = true
    od;
dead:
#if MUTANT != SAME_EPOCH
    epoch++;
#endif
#if MUTANT != SAME_VERSION
    version++;
#endif
    goto again
}

active proctype Newcomer() {
end:
    welcomed;
    submitted = true;
    told = true
}

active proctype Reader() {
    byte mine, within, kept, seen, now, reads;    /* the EPOCH and REACH that are bound, and the version that is kept */
    bool must;
    mine = epoch;
    within = reach;
    do
    :: reads < READS ->
        must = told;                              /* the read begins */
        if
        :: kept == 0 -> goto length
        :: within > 1 && submitted && !finished -> goto length                /* L1 */
        :: else
        fi;
        now = version;                            /* L2 */
        if :: now == kept -> goto found :: else fi;
#if MUTANT != BLIND
        if :: epoch != mine -> goto length :: else fi;                        /* L3 */
#endif
        kept = now;
        goto found;
length:
#if MUTANT == REACH_FIRST
        now = reach;
#endif
        seen = epoch;                             /* L4 */
        if
        :: submitted -> finished                  /* L5 */
        :: !submitted
        fi;
        if
        :: seen != mine ->                        /* L6 */
            mine = seen; kept = 0;
#if MUTANT == REACH_FIRST
            within = now
#else
            within = reach
#endif
        :: else
        fi;
        now = version;                            /* L7 */
#if MUTANT == KEEP_ANYWAY
        kept = now;
#else
        if :: epoch == mine -> kept = now :: else fi;
#endif
found:
        atomic { assert(!must || (effect && now >= effect)); reads++; now = 0; seen = 0; must = false }
    :: else -> break
    od
}
