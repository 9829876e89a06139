/* Waiting at the gate: the WAITING word, the semaphore, the threads of one process.

   Models      memory.gate.Gate (_wait_asleep, _lead, _follow, _wake_followers), memory.gatekeeper.GateKeeper (finish, wake, stop).
   Processes   Two threads of one process, each waiting for the first or the second of two finishes; a coordinator that
               finishes twice, or once and then stops the flow.
   Memory      TSO: every process has a store buffer, a queue that empties at any time; a load sees memory, for nobody
               loads here what it stores; a fence waits until the buffer is empty. What threads of one process share
               (leader, beds) is behind locks, and so are the semaphore's operations.
   Abstracted  Sleeping has no time limit, so that a lost wake-up is a deadlock; the 50 us of spinning and the checks of
               each slice are left out. One slot.
   Properties  No lost wake-up: every thread leaves (no invalid end state), and only when its target is reached or the
               flow was stopped (assert).                                                                         */

/* Mutants */
#define NO_READER_FENCE    1  /* W2 is missing: FINISHED is loaded while WAITING is still in the buffer */
#define NO_WRITER_FENCE    2  /* K2 is missing: WAITING is loaded while FINISHED is still in the buffer */
#define NO_STOP_FENCE      3  /* stop posts while STATUS is still in the buffer */
#define NO_SECOND_LOOK     4  /* W3 is missing: a reader sleeps at once */
#define WAKE_BEFORE_FINISH 5  /* K3 ahead of K1 */
#define NO_SUCCESSOR       6  /* a leader that leaves wakes nobody */
#define WAKE_THEN_LEAVE    7  /* a leader wakes the others, then gives up its place */
#define BED_AFTER_LOOK     8  /* a follower looks for the leader first, and then makes its bed */

#ifndef MUTANT
#define MUTANT 0
#endif

#define STATUS   0
#define FINISHED 1
#define NOBODY   9

byte finished;
bit waiting, stopped;
chan ours   = [2] of { bit };                     /* the process's store buffer: WAITING */
chan theirs = [2] of { byte, byte };              /* the coordinator's: which word, value */
bit semaphore;
byte leader = NOBODY;
bool bed[2], awake[2];                            /* by thread: it stands in the queue; it has been given back */

active proctype Memory() {
    byte value;
end:do
    :: ours?waiting
    :: atomic { theirs?FINISHED, value -> finished = value; value = 0 }
    :: atomic { theirs?STATUS, value -> stopped = 1; value = 0 }
    od
}

#define reached (finished >= target)
#define done    (reached || stopped)

inline wake_followers() {
    if :: atomic { bed[0] -> bed[0] = false; awake[0] = true } :: !bed[0] fi;
    if :: atomic { bed[1] -> bed[1] = false; awake[1] = true } :: !bed[1] fi
}

inline sleep() { atomic { semaphore == 1 -> semaphore = 0 } }

inline lead() {
    ours!1;                                       /* W1 */
#if MUTANT != NO_READER_FENCE
    empty(ours);                                  /* W2 */
#endif
#if MUTANT == NO_SECOND_LOOK
    sleep();
#endif
    do
    :: done -> break                              /* W3 */
    :: !done ->
        sleep();                                  /* W4 */
        wake_followers()
    od;
    ours!0;
#if MUTANT == WAKE_THEN_LEAVE
    wake_followers();
    leader = NOBODY
#else
    leader = NOBODY;
#if MUTANT != NO_SUCCESSOR
    wake_followers()
#endif
#endif
}

inline follow() {
#if MUTANT == BED_AFTER_LOOK
    if
    :: leader != NOBODY && !reached ->
        atomic { bed[_pid - 1] = true; awake[_pid - 1] = false };
        awake[_pid - 1]
    :: leader == NOBODY || reached
    fi;
#else
    atomic { bed[_pid - 1] = true; awake[_pid - 1] = false };
    if
    :: leader != NOBODY ->
        if
        :: !reached -> awake[_pid - 1]
        :: reached
        fi
    :: leader == NOBODY
    fi;
#endif
    atomic { bed[_pid - 1] = false; awake[_pid - 1] = false }
}

active [2] proctype Thread() {
    byte target;
    if :: target = 1 :: target = 2 fi;
    do
    :: done -> break
    :: !done ->
        if
        :: atomic { leader == NOBODY -> leader = _pid }; lead()
        :: leader != NOBODY -> follow()
        fi
    od;
    assert(reached || stopped)
}

inline wake() {
#if MUTANT != NO_WRITER_FENCE
    empty(theirs);                                /* K2 */
#endif
    if                                            /* K3 */
    :: waiting ->
        if
        :: semaphore == 0 -> semaphore = 1        /* it may be taken between the look and the post */
        :: semaphore == 1
        fi
    :: !waiting
    fi
}

inline finish(number) {
#if MUTANT == WAKE_BEFORE_FINISH
    wake();
    theirs!FINISHED, number
#else
    theirs!FINISHED, number;                      /* K1 */
    wake()
#endif
}

active proctype Coordinator() {
    finish(1);
    if
    :: finish(2)
    :: theirs!STATUS, 1;
#if MUTANT != NO_STOP_FENCE
       empty(theirs);
#endif
       semaphore = 1
    fi
}
