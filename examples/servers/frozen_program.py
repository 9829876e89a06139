"""A program for PyInstaller: it uses a flow that an installed Python serves.

pyinstaller --onedir frozen_program.py
strictflow-mp serve till &
dist/frozen_program/frozen_program
"""

import sys

from strictflow_mp import StrictFlow, write

flow = StrictFlow("till")


@write(flow, key="sold")
def sell(sold, number):
    return (sold or 0) + number


if __name__ == "__main__":
    if sys.argv[1:] == ["own"]:
        flow.start_loop()  # raises: there is no interpreter to start a coordinator in
    print(f"sold: {sell(1).result()}, and seen so: {flow.state['sold']}")
