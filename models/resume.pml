/* Commit and receipts, a coordinator that dies at any step, takeover, coming back.

   Models      coordinator.runner.Runner.run_burst, store.commit.StoreWriter.publish, store.receipts.Receipts,
               memory.suspect.Marker, coordinator.takeover.take_over, coordinator.slots.Slots, coordinator.requests.Requests,
               client.submitting, client.comeback, client.client.Client.pass_gate, client.state.FlowState.__getitem__.
   Processes   A coordinator that is killed between any two of its steps, DEATHS times, and each time has a successor;
               a client with TASKS P1 tasks, which once may take too long to come back, and go again before it has sent
               all; and one of: it reads at any moment; it may take back its last task; another
               process begins one read at any moment.
   Abstracted  A P1 sets its bit in the tree; its seq and its number in the gate are one. A task fails only
               in the scene in which the client reads. Slot 0, BASE, P2 and functions are left out, and so are HORIZON and reuse (pins.pml) and sleeping (waiting.pml). Times
               are any times: the grace may be over at once, and a process may stop for as long as it likes. Memory is
               sequentially consistent. T5 stands behind T6 here; in the code it is behind T7 as well, but ahead of the
               loop that admits, which is the same.
   Properties  1  A P1 takes effect at most once (assert). Its future resolves (no invalid end state): with its result if
                  it took effect and that is committed; with TaskCrashed only if a coordinator died while it ran, and
                  then it has no effect and is not run again; as cancelled only if it has no effect (assert).
               2  The client never reads a state without what it had submitted (assert).
               3  Nor does another process, unless the grace was over (assert); and its read ends (no invalid end state).
               4  A task that a read of the client has passed without its effect is not run any more (assert).
*/

/* Mutants */
#define RECEIPT_LATER       1  /* a receipt goes into the commit after the one that has its effect */
#define ONE_BLOCK           2  /* receipts are written over those that the last record names */
#define ANSWER_FIRST        3  /* answers leave ahead of VERSION */
#define ACK_LAST_READ       4  /* the ack names the last answer read, though an earlier task may have none */
#define CLEAR_FIRST         5  /* the takeover clears SUSPECT ahead of the commit that has the receipt */
#define CRASH_COUNTED       6  /* the receipt of a TaskCrashed carries the task's number, and FINISHED goes there */
#define NO_COUNT            7  /* no COUNT behind the frames that are sent again */
#define NO_NEW_VERSION      8  /* the takeover publishes nothing when there is no SUSPECT */
#define NO_FALL_BACK        9  /* FINISHED stays when a process comes back whose flag was lifted */
#define OUTDATED_FIRST     10  /* a read looks at RESTARTS ahead of the flag only, and not behind it */
#define RESTARTS_LATE      11  /* a client that came back takes RESTARTS from memory, not from who welcomed it */
#define UNREAD_FIRST       12  /* a task is awaited before it is pending: a thread that settles another acks it */
#define FAILED_UNWRITTEN   13  /* a burst of which nothing is left to commit commits no receipts either */
#define LIFTED_AT_ONCE     14  /* the flag of a client that goes again before it has sent all has no grace */
#define NOT_WITHDRAWN      15  /* what such a client has sent stays queued when it comes once more */

#ifndef MUTANT
#define MUTANT 0
#endif
/* What there is beside submits and deaths */
#define READS    1
#define CANCELS  2
#define WATCHED  3
byte scene;

#if MUTANT == ACK_LAST_READ
#define TASKS  3                                  /* the third brings the ack */
#endif
#ifndef TASKS
#define TASKS  2
#endif
#ifndef DEATHS
#define DEATHS 2
#endif

#define bit(x)   (1 << (x))
#define below(x) ((1 << (x)) - 1)                 /* the tasks ahead of x */

mtype = { TASK, CANCEL, COUNT, RESULT, CRASHED, CANCELLED };

/* Shared memory */
byte submitted, finished, restarts, suspect;                  /* suspect: seq + 1 */
bit version;                                      /* its lowest bit: only the last two records are looked at */
byte tree[2], delta[2];                           /* the records of an even and of an odd version */
byte ok[2], crashed[2];                           /* the two blocks for receipts */
#define committed tree[version]

/* The connection */
chan pipe    = [TASKS + 2] of { mtype, byte, byte };          /* seq, ack; COUNT: number */
chan answers = [TASKS + 3] of { mtype, byte };
bool connected = true, listening = true;
byte knock;                                       /* a handshake is under way: first number without an answer, or NONE */
#define NONE 9
byte welcomed;                                    /* RESTARTS of the coordinator that gave the last welcome */

/* Ghosts */
byte deaths;
byte told, must, forsaken, victims;               /* submits returned; owed to the other read; lifted; ran at a death */
byte raised, passed;                             /* ran last without effect; a read has passed it without effect */
byte took_back, failed, resolved;
bool is_fresh;                                    /* VERSION is still that of the client's last read */

/* The coordinator */

inline mortal() { if :: deaths < DEATHS -> deaths++; goto dead :: true fi }

inline finish(number) { if :: number > finished -> finished = number :: else fi }

inline publish() {                                /* C1 to C5 */
#if MUTANT == ONE_BLOCK
    block = delta[version];
#endif
    atomic { mortal();                            /* C1, C4: neither is looked at before C5 */
#if MUTANT == RECEIPT_LATER
        ok[block] = r_ok & ~burst; crashed[block] = r_crashed;
#else
        ok[block] = r_ok; crashed[block] = r_crashed;
#endif
        tree[1 - version] = committed | burst; delta[1 - version] = block };
    atomic { mortal(); version = 1 - version; is_fresh = false;       /* C5 */
        block = 1 - block; tree[1 - version] = 0; delta[1 - version] = 0;
#if MUTANT != ONE_BLOCK
        ok[block] = 0; crashed[block] = 0             /* nobody looks at these any more */
#endif
    }
}

#define KIND(seq) (raised & bit(seq) -> CRASHED : RESULT)

inline answer() {
    atomic { mortal(); seq = 0;
        do
        :: seq < TASKS -> if :: (ran & bit(seq)) && connected -> answers!KIND(seq), seq :: else fi; seq++
        :: else -> break
        od; seq = 0 }
}

active proctype Coordinator() {
    byte r_ok, r_crashed, a_ok, a_crashed, burst, ran, last, seq, ack, block = 1, waiting, count;
    mtype kind;
    chan queue = [TASKS + 2] of { byte, bool };   /* seq, whether to run it */
    bool runs, away, is_heir;
again:
    if
    :: is_heir ->
        atomic { mortal(); restarts++ };          /* T1 */
        atomic { block = delta[version];      /* T2 */
                 r_ok = ok[block]; r_crashed = crashed[block]; block = 1 - block };
        atomic { if :: suspect -> r_crashed = r_crashed | bit(suspect - 1) :: else fi };         /* T3 */
#if MUTANT == CLEAR_FIRST
        atomic { mortal(); suspect = 0 };
#endif
#if MUTANT == NO_NEW_VERSION
        if :: suspect -> publish() :: else fi;
#else
        publish();                                /* T4 */
#endif
        atomic { mortal(); seq = TASKS;           /* T6 */
#if MUTANT == CRASH_COUNTED
            do :: seq > 0 && !((r_ok | r_crashed) & bit(seq - 1)) -> seq-- :: else -> break od;
#else
            do :: seq > 0 && !(r_ok & bit(seq - 1)) -> seq-- :: else -> break od;
#endif
            finish(seq); seq = 0 };
        atomic { mortal(); suspect = 0 };         /* T5 */
        atomic { mortal(); away = true; listening = true }    /* T7 */
    :: else
    fi;
end:do
    :: atomic { nempty(pipe) ->
            pipe?kind, seq, ack;
            if
            :: kind == COUNT -> queue!seq, false
            :: kind == CANCEL ->
                if
                :: waiting & bit(seq) -> waiting = waiting & ~bit(seq);
                        if :: connected -> answers!CANCELLED, seq :: else fi
                :: else
                fi
            :: kind == TASK ->
                r_ok = r_ok & ~below(ack); r_crashed = r_crashed & ~below(ack);
                if
                :: a_ok & bit(seq) -> queue!seq, false; if :: connected -> answers!KIND(seq), seq :: else fi
                :: a_crashed & bit(seq) -> queue!seq, false; if :: connected -> answers!CRASHED, seq :: else fi
                :: else -> queue!seq, true; waiting = waiting | bit(seq)
                fi
            fi;
            seq = 0; ack = 0 }
    :: nempty(queue) ->
        do
        :: nempty(queue) && count < 2 ->
            atomic { mortal(); queue?seq, runs; last = seq + 1; count++;
                     runs = runs && (waiting & bit(seq)) };
            if
            :: runs ->
                atomic { waiting = waiting & ~bit(seq);
                         assert(!(victims & bit(seq)));               /* never again after a crash */
                         assert(!((committed | burst) & bit(seq)));   /* at most once */
                         assert(!(passed & bit(seq)));                /* nor behind a reader's back */
                         suspect = seq + 1 };             /* E1: it runs */
                atomic { mortal(); suspect = 0;           /* E2 */
                         if
                         :: raised = raised & ~bit(seq); burst = burst | bit(seq)
                         :: scene == READS -> raised = raised | bit(seq)          /* it fails */
                         fi;
                         ran = ran | bit(seq); r_ok = r_ok | bit(seq) }
            :: else
            fi;
            atomic { seq = 0; runs = false }
        :: count > 0 -> break
        od;
#if MUTANT == ANSWER_FIRST
        answer();
#endif
#if MUTANT == FAILED_UNWRITTEN
        if :: burst -> publish() :: else fi;
#else
        if :: ran -> publish() :: else fi;
#endif
        atomic { mortal(); finish(last) };        /* F2 */
#if MUTANT != ANSWER_FIRST
        answer();
#endif
        atomic { burst = 0; ran = 0; last = 0; count = 0 }
    :: atomic { away && empty(queue) && submitted > finished ->          /* the grace is over */
            if
            :: scene == WATCHED ->
                forsaken = forsaken | (below(submitted) & ~below(finished)); must = must & ~forsaken
            :: else
            fi;
            finished = submitted }
    :: atomic { !connected && !away && empty(pipe) ->         /* it came back, and went again before it had sent all */
#if MUTANT == LIFTED_AT_ONCE
            finished = submitted;
#endif
            away = true }
    :: atomic { knock && away ->                  /* B3 */
#if MUTANT != NOT_WITHDRAWN
            do :: nempty(queue) -> queue?seq, runs :: empty(queue) -> break od;
            waiting = 0; runs = false;
#endif
#if MUTANT != NO_FALL_BACK
            if :: knock != NONE && knock - 1 < finished -> finished = knock - 1 :: else fi;
#endif
            a_ok = r_ok; a_crashed = r_crashed;
            do :: nempty(answers) -> answers?kind, seq :: empty(answers) -> break od;
            forsaken = 0; away = false; knock = 0; seq = 0; welcomed = restarts; connected = true }
    :: atomic { deaths < DEATHS -> deaths++; goto dead }
    od
dead:
    atomic {
        if :: suspect -> victims = victims | bit(suspect - 1) :: else fi;
        do :: nempty(pipe) -> pipe?kind, seq, ack :: empty(pipe) -> break od;
        do :: nempty(queue) -> queue?seq, runs :: empty(queue) -> break od;
        r_ok = 0; r_crashed = 0; a_ok = 0; a_crashed = 0; burst = 0; ran = 0; last = 0; seq = 0; ack = 0; block = 0; waiting = 0;
        count = 0; kind = 0; runs = false; away = false; is_heir = true;
        connected = false; listening = false; knock = 0;
        goto again }
}

/* The client */

#define outdated (restarts != mine && pending)
#define without_effect (victims | raised | took_back | cancelling)

inline settle() {
    atomic { answers?kind, seq;
        if
        :: pending & bit(seq) ->
            pending = pending & ~bit(seq); resolved = resolved | bit(seq);
            if
            :: kind == RESULT -> assert(committed & bit(seq))
            :: kind == CRASHED -> failed = failed | bit(seq); assert((victims | raised) & bit(seq))
            :: kind == CANCELLED -> took_back = took_back | bit(seq)
            fi;
            assert(!((failed | took_back) & committed));
#if MUTANT == ACK_LAST_READ
            acked = seq + 1
#else
            do :: acked < next && !(pending & bit(acked)) -> acked++ :: else -> break od
#endif
        :: else
        fi;
        seq = 0; kind = 0 }
}

inline come_back() {
    do
    :: connected && !outdated -> break            /* another way led back */
    :: atomic { !connected && restarts != mine && listening && !knock ->      /* B2, B3 */
            seq = 0;
            do :: seq < TASKS && !(pending & bit(seq)) -> seq++ :: else -> break od;
            knock = (seq < TASKS -> seq + 1 : NONE); seq = 0 };
        if
        :: atomic { !has_gone && connected ->     /* too late: it goes again, and tries once more */
                has_gone = true;
                if :: pending & 1 -> pipe!TASK, 0, 0 :: true fi;
                connected = false }
        :: atomic { connected -> seen = welcomed };
            atomic {                              /* B4 */
                if
                :: connected && welcomed == seen ->
                    do
                    :: seq < TASKS -> if :: pending & bit(seq) -> pipe!TASK, seq, 0 :: else fi; seq++
                    :: else -> break
                    od;
#if MUTANT != NO_COUNT
                    if :: next + drawn > 0 -> pipe!COUNT, next + drawn - 1, 0 :: else fi;
#endif
                    seq = 0
                :: else
                fi };
#if MUTANT == RESTARTS_LATE
            atomic { mine = restarts; seen = 0 };
#else
            atomic { mine = seen; seen = 0 };
#endif
            break
        :: atomic { !connected && !knock -> skip }            /* it has died */
        fi
    od
}

active proctype Client() {
    byte next, drawn, pending, acked, seq, mine, seen, cancelling, target;
    mtype kind;
    bool is_sent, has_gone;
    byte fresh_tree;
    if :: scene = READS :: scene = CANCELS :: scene = WATCHED fi;
    do
    :: next < TASKS ->
#if MUTANT == UNREAD_FIRST
        atomic { if :: !pending -> acked = next + 1 :: else fi };
#endif
        atomic { pending = pending | bit(next); drawn = 1;    /* S1 */
                 is_sent = connected; if :: is_sent -> pipe!TASK, next, acked :: else fi };
        if :: is_sent -> is_sent = false :: else -> come_back() fi;
        atomic { submitted = next + 1; drawn = 0;             /* S2, S3 */
                 told = told | bit(next); next++ }
    :: atomic { scene == CANCELS && next == TASKS && !cancelling && connected && (pending & bit(TASKS - 1)) ->
            pipe!CANCEL, TASKS - 1, 0; cancelling = bit(TASKS - 1) }
    :: nempty(answers) -> settle()
    :: !connected && pending -> come_back()
    :: scene == READS && told ->                  /* a read */
        if
        :: submitted == finished ->               /* the fast path */
            if :: atomic { is_fresh -> goto seen_fresh } :: else fi
        :: else
        fi;
pass:   if :: outdated -> come_back() :: else fi;
        target = submitted;
        do
        :: finished >= target -> break
        :: outdated -> come_back()                            /* _check */
        :: !connected && finished < target && !pending -> break       /* nothing of ours: see the other read */
        od;
#if MUTANT != OUTDATED_FIRST
        if :: outdated -> goto pass :: else fi;
#endif
        atomic { is_fresh = true; fresh_tree = committed };
seen_fresh:
        atomic { assert(!(told & ~fresh_tree & ~without_effect)); passed = passed | (told & ~fresh_tree); target = 0 }
    :: next == TASKS && !pending -> break
    od;
    finished >= submitted;                        /* no flag stays up */
    assert(resolved == below(TASKS));
    assert(!((failed | took_back) & committed) && (committed | failed | took_back) == below(TASKS))
}

/* Another process */

active proctype Reader() {
    byte target;
end:    atomic { scene == WATCHED -> must = told & ~forsaken };
    target = submitted;
    finished >= target;
    atomic { assert(!(must & ~committed & ~victims)); must = 0 }
}
