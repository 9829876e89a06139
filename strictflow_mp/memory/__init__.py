"""The memory: what lies in a flow's shared memory besides the tree, word by word.

`segment` says where each word is, `fences` and `mapping` how it is read and written, with which fences. The gate is the
protocol by which a read waits for the P1 tasks that were submitted before it: a flag and a ticket for each slot, and a
semaphore on which its readers sleep. The rest says which task is running, and what a dead coordinator left. Each word
has one writer at a time; the module that writes it says who that is, in which order, and what holds if the writer dies
there.
"""
