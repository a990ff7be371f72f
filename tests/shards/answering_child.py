"""A child process for test_child.py: answers each message, as the message says."""

import os
import signal
import threading


class UnsendableError(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, one, two):
        super().__init__(one)


def fail(message):
    raise ValueError(f"no {message}")


def main(connection, spec):
    from shards.ground.errors import portable

    connection.send(("ready", spec, os.environ["OMP_NUM_THREADS"], signal.getsignal(signal.SIGINT) is signal.SIG_IGN))
    while True:
        message = connection.recv()
        if message == "exit":
            os._exit(7)
        if message == "threads":
            connection.send(threading.active_count())
        if message == "write":
            spec += 1
            connection.send(spec)
            continue
        try:
            if message == "unsendable":
                raise UnsendableError("a", "b")
            fail(message)
        except Exception as error:
            connection.send(portable(error, "in a child"))
