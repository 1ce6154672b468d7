"""A process of its own that reads MATLAB files, started by ``label_files``: SciPy's reader crashes on damaged ones.

It knows nothing of this package, so that starting it takes as long as loading SciPy. Each line of its input is a path
and how to read it; each answer is a pickle: the file's variables, or why there are none.
"""

import json
import pickle
import resource
import struct
import sys


def _limit_memory(most_bytes: int) -> None:
    """Take no more memory than so much, beside what SciPy took when it was loaded (Linux)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = taken + most_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def serve(most_bytes: int) -> None:
    """Answer until the input ends; a file may take ``most_bytes`` of memory."""
    from scipy.io import loadmat

    _limit_memory(most_bytes)
    for line in sys.stdin.buffer:
        path, simplify = json.loads(line)
        try:
            answer = pickle.dumps(loadmat(path, simplify_cells=simplify))
        except Exception as error:  # a damaged file makes SciPy raise whatever it stumbles over
            answer = pickle.dumps(str(error) or type(error).__name__)
        sys.stdout.buffer.write(struct.pack("<Q", len(answer)) + answer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
