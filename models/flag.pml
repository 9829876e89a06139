/* The P1 flag: submit, finish, gated read, and the slots of processes that die.

   Models      memory.gate.Gate (raise_flag, is_open, wait), memory.gatekeeper.GateKeeper (raise_own, finish, lift, dismiss),
               client.submitting._dispatch, client.outgoing.Outgoing, coordinator.loop.SFLoop, coordinator.runner.Runner.run_burst,
               coordinator.sessions.Sessions (poll, expel), coordinator.slots.Slots.reclaim.
   Processes   A coordinator, a reader that begins at any moment, and one of: a worker with two P1 tasks; a worker with
               one, and another in its slot when it has died, or a second P1 that the first one's task submits
               (slot 0), or a connection that may be closed while the worker lives, or a signal handler that submits
               at any step of the worker's own submit. A worker dies (SIGKILL) or stops
               for ever (SIGSTOP) between any two of its steps. Two slots: the coordinator's own and the worker's.
   Abstracted  A P1 is a bit, VERSION is the set of bits. A frame enters the pipe whole or not at all. Memory is
               sequentially consistent: the stores of a process are seen in order, and no load here must stay behind
               an earlier store of its process. Sleeping is in waiting.pml.
   Properties  1  A read that begins after a submit has returned, in any process, finds that P1 in the state (assert).
               2  The read ends (no invalid end state): no flag of a dead, stopped or expelled process stays up, and a
                  read does not wait for what comes later. For that a `stubborn` coordinator takes out of the pipes,
                  while the read waits, only frames that were in them when it had looked.                     */

/* Mutants */
#define RETURN_BEFORE_FLAG  1  /* submit returns while SUBMITTED is still in its core's store buffer */
#define FLAG_BEFORE_FRAME   2  /* SUBMITTED is stored before the frame is in the pipe */
#define FINISH_THEN_PUBLISH 3  /* FINISHED is stored before VERSION */
#define WAIT_FOR_OPEN       4  /* a read waits until no flag is up at all */
#define NO_LIFT             5  /* nobody lowers the flag of a closed connection or a dead process */
#define LIFT_ONCE           6  /* the flag of a closed connection is lowered when it is closed, and not looked at again */
#define KEEP_SUBMITTED      7  /* dismiss leaves SUBMITTED behind FINISHED, so the next owner uses a number again */
#define RECLAIM_IN_POLL     8  /* a slot is taken back while frames of it are received but not yet queued */
#define OWN_AT_ONCE         9  /* FINISHED[0] passes over a P1 that a task submitted and that is still queued */
#define STORE_BACK         10  /* SUBMITTED is stored from a number that was read before a handler submitted */
#define NUMBER_FIRST       11  /* a number is drawn, and its frame sent later: a handler's frame overtakes it */
#define PUT_TWICE          12  /* what a handler has put into the stream already is put there again */

#ifndef MUTANT
#define MUTANT 0
#endif

#define SLOTS  2
#define bit(x) (1 << (x))
#define NESTED 0                     /* the P1 that a task submits; the others: 1 to 4 */
#define HANDLED 5                    /* the one that a handler submits */

byte submitted[SLOTS], finished[SLOTS];
byte version;                                     /* the P1 tasks that are committed */
chan pipe[SLOTS]    = [2] of { byte, byte };      /* number, P1 */
chan arrived[SLOTS] = [2] of { byte, byte };      /* received by poll, not yet queued by _drain */
chan queue          = [5] of { byte, byte, byte } /* slot, number, P1 */
bool alive[SLOTS], connected[SLOTS], taken[SLOTS];
byte queued[SLOTS];
bool enters;                                      /* a handler submits in the middle of a worker's submit */
bool over;                                        /* the read has ended: so does the model */

byte told, lost;                                  /* ghosts: submits that returned; frames of an expelled process */
bool stubborn, looked;
byte room[SLOTS];                                 /* frames that a stubborn coordinator may still take */

inline mortal() { if :: true :: atomic { alive[me] = false; goto stopped } :: goto stopped fi }

/* A submit may begin in the middle of another one: after any step of that, in a handler of its process. It goes through
   all of its own steps before the other goes on. `drawn`: the last number that is hung behind the others; `put`: all up to
   it are in the stream; `sent`: in the pipe. */

inline flush() {
    do
    :: sent < put ->
        atomic {                                  /* S1 */
            if
            :: connected[me] -> pipe[me]!(sent + 1), tasks[sent + 1 - first]; sent++
            :: else -> goto stopped               /* has_ended: no flag is raised */
            fi
        }
        mortal()
    :: else -> break
    od
}

inline raise_flag(ticket) {
#if MUTANT == STORE_BACK
    submitted[me] = ticket
#else
    atomic { if :: submitted[me] < ticket -> submitted[me] = ticket :: else fi }       /* S2: one C call */
#endif
}

inline interrupt() {
    if
    :: handler ->
        handler = false;
#if MUTANT == NUMBER_FIRST
        drawn++; inner = drawn;
        atomic { if :: connected[me] -> pipe[me]!inner, HANDLED :: else -> goto stopped fi };
        mortal();
#else
        put = drawn;                              /* what is numbered already, first */
        mortal();
        atomic { drawn++; inner = drawn; tasks[inner - first] = HANDLED };
        put = inner;
        mortal();
        flush();
#endif
        raise_flag(inner);
        mortal();
        atomic { told = told | bit(HANDLED); inner = 0 }
    :: true
    fi
}

proctype Worker(byte me, task, count) {
    byte first = submitted[me];                   /* Gate.last */
    byte number, inner, drawn = first, put = first, sent = first;
    byte tasks[4];
    bool handler = enters;
    {
    do
    :: count == 0 -> break
    :: count > 0 ->
#if MUTANT == NUMBER_FIRST
        drawn++; number = drawn;
        interrupt();
        atomic { if :: connected[me] -> pipe[me]!number, task :: else -> goto stopped fi };
        mortal();
#else
        do
        :: number = drawn + 1;                    /* packed with this number */
           interrupt();
           atomic {
               if
               :: drawn == number - 1 -> drawn = number; tasks[number - first] = task; break
               :: else                            /* packed anew */
               fi }
        od;
        interrupt();
#if MUTANT == FLAG_BEFORE_FRAME
        submitted[me] = number;
        mortal();
#endif
#if MUTANT == PUT_TWICE
        atomic { if :: put < number -> put = number :: else -> pipe[me]!number, task fi };
#else
        atomic { if :: put < number -> put = number :: else fi };      /* one C call: once */
#endif
        interrupt();
        flush();
#endif
        interrupt();
#if MUTANT == RETURN_BEFORE_FLAG
        told = told | bit(task);
#endif
        raise_flag(number);
        mortal();
        interrupt();
        atomic { told = told | bit(task);         /* S3 */
                 task++; count-- }
    od;
    mortal();
stopped:
    atomic { number = 0; task = 0; count = 0; inner = 0; drawn = 0; put = 0; sent = 0; first = 0; handler = false;
             tasks[0] = 0; tasks[1] = 0; tasks[2] = 0; tasks[3] = 0 }
    } unless { over }
}

inline admit(slot, task, count) {
    alive[slot] = true; connected[slot] = true; taken[slot] = true;
    run Worker(slot, task, count)
}

#if MUTANT == RECLAIM_IN_POLL
#define all_queued(i) (queued[i] == 0)
#else
#define all_queued(i) (queued[i] == 0 && empty(arrived[i]))
#endif
#define idle(i)     (taken[i] && !connected[i] && all_queued(i))
#define held_up     (stubborn && looked)
#define max(a, b)   ((a) > (b) -> (a) : (b))

inline of_slot(i) {
    if
    :: atomic { connected[i] && nempty(pipe[i]) && (!held_up || room[i] > 0) ->
            pipe[i]?number, task; queue!i, number, task; queued[i]++;
            if :: held_up -> room[i]-- :: else fi }
    :: atomic { connected[i] && !alive[i] && (!held_up || len(pipe[i]) <= room[i]) ->
            do                                    /* its pidfd: all that it sent is in the pipe */
            :: pipe[i]?number, task -> arrived[i]!number, task
            :: empty(pipe[i]) -> break
            od;
            room[i] = 0;
            connected[i] = false }
    :: atomic { nempty(arrived[i]) -> arrived[i]?number, task; queue!i, number, task; queued[i]++ }
    :: atomic { expels && connected[i] && alive[i] ->
            do :: pipe[i]?number, task -> lost = lost | bit(task) :: empty(pipe[i]) -> break od;
            room[i] = 0;
            connected[i] = false }
#if MUTANT == LIFT_ONCE
    :: idle(i) && !lifted[i] -> finished[i] = max(submitted[i], finished[i]); lifted[i] = true
#elif MUTANT != NO_LIFT
    :: idle(i) && submitted[i] > finished[i] -> finished[i] = submitted[i]
#endif
#if MUTANT != NO_LIFT
    :: idle(i) && !alive[i] ->
            high = max(submitted[i], finished[i]);
            finished[i] = high;
#if MUTANT != KEEP_SUBMITTED
            submitted[i] = high;
#endif
            atomic { high = 0; taken[i] = false;
                if :: newcomer -> newcomer = false; admit(1, 2, 1) :: else fi }
#endif
    fi;
    atomic { number = 0; task = 0 }
}

inline finish() {
    if :: done[1] > finished[1] -> finished[1] = done[1] :: else fi;
#if MUTANT == OWN_AT_ONCE
    finished[0] = raised
#else
    finished[0] = (due -> due - 1 : raised)
#endif
}

active proctype Coordinator() {
    byte slot, number, task, high, burst, count, raised, due;
    bool newcomer, nests, expels;
    byte done[SLOTS];
    bool lifted[SLOTS];
    atomic {
        if :: stubborn = true :: stubborn = false fi;
        if
        :: admit(1, 1, 1); newcomer = true        /* and another in its slot when it has died */
        :: admit(1, 1, 1); nests = true           /* and one that its task submits */
        :: admit(1, 2, 2)
        :: admit(1, 2, 1); expels = true          /* whose connection may be closed while it lives */
        :: enters = true; admit(1, 1, 1)          /* in the middle of whose submit a handler submits */
        fi
    }
    {
end:do
    :: of_slot(1)
    :: nempty(queue) ->
        atomic { raised++; submitted[0] = raised };
        atomic {
        do
        :: nempty(queue) && count < 2 ->
            queue?slot, number, task; burst = burst | bit(task); count++;
            if
            :: slot == 0 -> due = 0
            :: slot > 0 -> done[slot] = number; queued[slot]--
            fi;
            if
            :: nests && task == 1 ->              /* this task submits another */
                raised++; submitted[0] = raised; due = raised;
                queue!0, due, NESTED; told = told | bit(NESTED)
            :: else
            fi
        :: count > 0 -> break
        od;
        slot = 0; number = 0; task = 0 }
#if MUTANT == FINISH_THEN_PUBLISH
        finish();
        version = version | burst;
#else
        version = version | burst;                /* F1 */
        finish();                                 /* F2 */
#endif
        atomic { burst = 0; count = 0; done[1] = 0 }
    od
    } unless { over }
}

active proctype Reader() {
    byte must, i, target[SLOTS];
    must = told;                                  /* the read begins */
#if MUTANT == WAIT_FOR_OPEN
    atomic { room[1] = len(pipe[1]); looked = true };
    submitted[0] <= finished[0] && submitted[1] <= finished[1];
#else
    do                                            /* R1, the fast path: is_open() */
    :: i < SLOTS ->
        target[i] = submitted[i];
        if :: target[i] == finished[i] -> i++ :: else -> break fi
    :: i == SLOTS -> goto pass
    od;
    target[0] = submitted[0];
    atomic { target[1] = submitted[1];
             if :: stubborn -> room[1] = len(pipe[1]) :: else fi; looked = true };
    finished[0] >= target[0] && finished[1] >= target[1];                                     /* R2 */
#endif
pass:
    atomic { assert((must & ~version & ~lost) == 0); over = true }           /* R3 */
}
