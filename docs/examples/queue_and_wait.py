#!/usr/bin/env python3
"""Queues a message on SQLite and waits for its outcome; needs nothing but Python.

    queue_and_wait.py ucwa-relay.db sip:alice@contoso.com sip:bob@contoso.com "Deploy finished"

Exit code 0: delivered; 1: it ended otherwise, the reason is on stderr; 2: it has not ended within a minute.
"""
import sqlite3
import sys
import time

MOVING = ("queued", "held", "sending", "sent")


def main(path, sender, recipients, body):
    # mode=rw: a mistyped path is an error and no new file. A transaction of the server's is waited for.
    database = sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=10)
    with database:
        row = database.execute(
            "INSERT INTO outbox (account, recipients, body) VALUES (?, ?, ?)", (sender, recipients, body)
        ).lastrowid
    deadline = time.monotonic() + 60
    while True:
        state, reason = database.execute(
            "SELECT state, last_error FROM outbox WHERE id = ?", (row,)
        ).fetchone()
        if state not in MOVING or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    print(f"row {row}: {state}")
    if state == "delivered":
        return 0
    print(reason or "nobody has said why", file=sys.stderr)
    return 2 if state in MOVING else 1


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
