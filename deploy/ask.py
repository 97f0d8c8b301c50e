"""Ask a running system something with a known answer, streamed, and the same by two callers at once.

``python ask.py [ADDRESS]``; exit status 0 when the answers are right. For scripts that try a stack from outside.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from dsclient import DEFAULT_ADDRESS, Client, Completion

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "Paris"
#: longest time for one answer, in seconds
DEADLINE_S = 60.0


def ask(client: Client) -> Completion:
    """The greedy answer to the question, written as it comes."""
    stream = client.stream_chat(QUESTION, temperature=0, max_tokens=32, deadline_s=DEADLINE_S)
    pieces = [output.text for output in stream]
    completion = stream.result()
    assert "".join(pieces) == completion.text, (pieces, completion)
    return completion


def main(address: str) -> int:
    """Ask once alone and twice at a time; the answers must agree and name the city."""
    with Client(address, timeout_s=30.0) as client:
        first = ask(client)
        print(f"{QUESTION[0]['content']} -> {first.text}")
        print(f"first token after {first.ttft_s * 1e3:.0f} ms, all after {first.total_s * 1e3:.0f} ms")
        with ThreadPoolExecutor(2) as pool:
            others = list(pool.map(ask, [client, client]))
        for worker in client.status().workers:
            print(f"{worker.name} is {worker.state}")
    return 0 if ANSWER in first.text and all(other.text == first.text for other in others) else 1


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or [DEFAULT_ADDRESS])))
