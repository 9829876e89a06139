"""The system: processes, and where they meet.

Which machines are refused; who a process is, so that it can be proved dead and is not taken for a later one of the
same pid; how a fresh interpreter is started as a child; the directory, one for each flow, in which a coordinator can
be found, and the lock that says whether it lives; what a process says of its sys.path; that descriptors 0 to 2 are
somebody's, and that what is printed waits for nobody; how long to look again before sleeping; what semaphores and
shared memory are made with, and how much memory the limits of a container leave. Nothing here knows of flows' states,
tasks or frames.
"""
