"""The client: a process's end of a flow.

There is one in each process for each flow, shared by all its handles and threads. It reads the state from shared memory
itself and asks nobody (without the GIL each thread through objects of its own); it submits tasks to the coordinator
over one connection, raises the process's flag for each P1, and reads the answers in the thread that waits for them.
When the coordinator has died it finds the next one and sends again whatever has no answer; if there is none in time,
the receipts in shared memory say which tasks were executed.
"""
