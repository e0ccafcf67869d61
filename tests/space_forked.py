"""The Space as ZeroGPU runs it: its GPU function in a forked worker that is used again, arguments and answers pickled.

`python space_forked.py APP_FOLDER` prints what the function says here and there, and what the page starts with.
"""

import json
import multiprocessing
import pickle
import sys


def work(function, tasks, answers):
    while (task := tasks.recv_bytes()) != b"end":
        arguments, limit = pickle.loads(task)
        running = function(*arguments)
        for i, value in enumerate(running):
            answers.send_bytes(pickle.dumps(value))
            if i + 1 == limit:
                running.close()  # the visitor pressed Stop
        answers.send_bytes(b"end")


def main(folder):
    sys.path.insert(0, folder)
    import app

    (tasks, send), (receive, answers) = (multiprocessing.Pipe(duplex=False) for _ in range(2))
    worker = multiprocessing.get_context("fork").Process(target=work, args=(app.answer, tasks, answers), daemon=True)
    worker.start()

    def ask(arguments, limit=None):
        send.send_bytes(pickle.dumps((arguments, limit)))
        values = []
        while (value := receive.recv_bytes()) != b"end":
            values.append(pickle.loads(value)[:2])
        return values

    requests = [("Hello", name, "", 6, temperature, 1, 3) for name in app.ADAPTERS for temperature in (0, 1)]
    stopped = len(ask(requests[0], limit=2))
    there = [ask(request)[-1] for request in requests]
    send.send_bytes(b"end")
    worker.join(timeout=30)
    here = [list(app.answer(*request))[-1][:2] for request in requests]
    page = {block.label: block.value for block in app.demo.blocks.values() if hasattr(block, "value")}
    print(json.dumps({"here": here, "there": there, "stopped": stopped, "page": page}, default=str))


if __name__ == "__main__":
    main(sys.argv[1])
