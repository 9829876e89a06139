"""Tools: programs that look after flows.

The command line (`cli`, which starts without its extra, and `commands`), `top`, and the demo. They use a flow as any
user does, through its handle; what a coordinator that is busy or dead cannot tell, a `glance` at shared memory does,
without asking and without being attached. Figures and their layout (`rates`, `screen`, `plain`) know no flow, so that
they can be tested without one.
"""
