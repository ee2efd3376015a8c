"""What every process of a run has."""

from __future__ import annotations

import subprocess
import sys

_CODE = """
import gc, weakref
from miles.cluster.actors import settle
class Node: pass
def cycle():
    node = Node()
    node.me = node
    return weakref.ref(node)
before = cycle()
settle()
print("collected before", before() is None, "passed over", gc.get_freeze_count() > 10_000)
# As many objects as a step of a thousand samples has alive at once: never a reason to look.
gc.callbacks.append(lambda phase, info: print("looked") if phase == "start" else None)
alive = [[i] for i in range(40_000)]
del alive
gc.callbacks.clear()
after = cycle()
alive = [[i] for i in range(10**6)]
print("collected later", after() is None)
"""


def test_a_settled_process_passes_over_what_it_keeps_and_still_collects():
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["collected before True passed over True", "collected later True"]
