"""Do the instructions of a prompt hold? The verifiable instructions of IFEval (arXiv 2311.07911), of IFBench and of its
training set (arXiv 2507.02833), by their ids.

    metadata {"instruction_id_list": ["punctuation:no_comma", ...], "kwargs": [{}, ...]} --checks--> 1 if all hold, else 0

One function for each id: the response, and the arguments of the data set by their names. All of them take time linear in the
response. What an instruction asks for must be there: one that has nothing to hold for (each sentence longer than the one
before, and only one sentence) fails, since saying less would be the cheapest way to follow it.
"""

from . import ifbench_format, ifbench_words, ifeval, iftrain
from .catalogue import bound_checks
from .reward import follows

__all__ = ["bound_checks", "follows", "ifbench_format", "ifbench_words", "ifeval", "iftrain"]
