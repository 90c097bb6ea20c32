"""A worker process: reads tasks as JSON lines, answers as JSON lines, dies with its driver.

Started as `python -m quadriga.engine.worker SPEC`, where SPEC is JSON with parent, workload, folder, seed, key and threads. Its
first line says that the workload is loaded, and is the driver's; time limits of tasks begin then.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from typing import Any

from quadriga.core.errors import BadInput
from quadriga.core.parent import die_with_parent, first_to_go


def main(spec: dict[str, Any]) -> None:
    """Serve tasks until standard input closes."""
    die_with_parent(spec["parent"])
    first_to_go()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what user code prints must not mix with the replies

    import psutil
    import torch

    from quadriga.engine.admission import admitted, fatal

    torch.set_num_threads(spec["threads"])

    def send(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")

    desk, answer = None, dict[str, Any]()
    try:
        desk = admitted(spec)
    except BadInput as error:
        answer = fatal(error)
    gc.freeze()  # what lives as long as the process is not looked through after every task: 80 ms of each
    send({"ready": time.time() - psutil.Process().create_time()})
    for line in sys.stdin:
        order = json.loads(line)
        if desk is not None:
            desk.progress = lambda event, number=order["number"]: send({"number": number, "progress": event})
            answer = desk.do(order["task"], order["args"])
        send({"number": order["number"], "result": answer})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
