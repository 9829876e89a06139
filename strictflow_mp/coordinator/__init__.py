"""The coordinator: the process in which SF-LOOP runs every task of a flow. Started by name, imported by nobody else.

`main` makes the `parts` and ends them; `takeover` begins where a dead coordinator ended. `admission`, `sessions` and
`slots` are about processes: how they come in, what they send and are sent, which slot they have. `loop` goes round:
`requests` does what frames ask for (`operations`: the ready-made P1 tasks), `scheduler` says what is next, `runner`
runs it. A P1 task sees a `transaction`, which ends in a `burst`; `answers` tells what became of it. `inside` is the
flow as tasks see it.
"""
