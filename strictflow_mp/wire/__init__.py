"""The wire: what the two ends of a connection say to each other, and in what form it crosses.

`handshake` makes a connection of which each end is sure; `stream` carries `frames` over it. Functions, arguments,
failures and statistics each have a form in which they cross. A `TaskFuture` is where an answer arrives, and `inside`
says whether the code that runs is a task in SF-LOOP, for which the same calls mean something else. Both ends import
this room, and it imports neither.
"""
