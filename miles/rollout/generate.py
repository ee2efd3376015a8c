"""Text from the engines: one request for a group, or one turn of a trajectory.

    Sample (tokens: what the model sees) --POST /generate--> tokens, log-probs, text, finish reason, weight version

Tokens and log-probs are the engine's own (`meta_info.output_token_logprobs`); nothing is tokenized a second time.
`generate` is the default of --custom-generate-function-path and the building block for hooks of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miles.errors import EngineError
from miles.interfaces import Args
from miles.types import Sample, Status

from .context import GenerationContext, current
from .trajectory import append_generated


async def generate(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """One turn: continues `sample.tokens` and appends the answer to the sample, which it returns.

    Sets `status`: COMPLETED, TRUNCATED (length limit, also when the context leaves no room), or ABORTED with the
    partial answer. A later turn of the same trajectory gets another seed by itself, unless `sampling_params` holds a
    `sampling_seed` of the hook's own.

    Raises:
        EngineError: the engines failed, or a reply broke the protocol.
        WaitTimeout: no engine answered in time.
    """
    context = current()
    if not sample.tokens:
        sample.tokens = tokenize_prompt(context, sample)
    params = context.sampling.fit(sampling_params, len(sample.tokens))
    rid = context.request_id()
    issued, seed = context.seed(), context.next_seed()
    if params.get("sampling_seed", issued) == issued:
        params = {**params, "sampling_seed": seed}
    if params.get("max_new_tokens") == 0:
        return _no_room(sample, context)
    reply = await context.pool.generate(
        {"rid": rid, "input_ids": list(sample.tokens), "sampling_params": params, "return_logprob": True}, num_samples=1
    )
    if isinstance(reply, list):
        (reply,) = reply
    apply_reply(sample, reply, params, context)
    return sample


async def generate_group(contexts: Sequence[GenerationContext], samples: Sequence[Sample]) -> None:
    """All samples of one prompt in one request, one seed for each; the engine prefills the prompt once."""
    context = contexts[0]
    for sample in samples:
        if not sample.tokens:
            sample.tokens = tokenize_prompt(context, sample)
    rids = [c.request_id() for c in contexts]
    params = [
        context.sampling.fit(c.sampling.params(c.next_seed()), len(sample.tokens))
        for c, sample in zip(contexts, samples, strict=True)
    ]
    if any(p.get("max_new_tokens") == 0 for p in params):
        for sample in samples:
            _no_room(sample, context)
        return
    replies = await context.pool.generate(
        {
            "rid": rids,
            "input_ids": [list(s.tokens) for s in samples],
            "sampling_params": params,
            "return_logprob": True,
        },
        num_samples=len(samples),
    )
    if not isinstance(replies, list) or len(replies) != len(samples):
        got = len(replies) if isinstance(replies, list) else type(replies).__name__
        raise EngineError(f"/generate for {len(samples)} samples of group {context.group_index}, got {got} replies")
    for sample, reply, p in zip(samples, replies, params, strict=True):
        apply_reply(sample, reply, p, context)


def tokenize_prompt(context: GenerationContext, sample: Sample) -> list[int]:
    """Token ids of a prompt that came without any: text as it is, messages through the chat template."""
    if isinstance(sample.prompt, str):
        return list(context.tokenizer.encode(sample.prompt, add_special_tokens=False))
    ids = context.tokenizer.apply_chat_template(
        sample.prompt, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return list(ids)


def _no_room(sample: Sample, context: GenerationContext) -> Sample:
    """The context is full before the first new token: an empty turn, truncated."""
    sample.temperature = context.sampling.temperature
    append_generated(sample, [], [], "")
    sample.status = Status.TRUNCATED
    return sample


def apply_reply(
    sample: Sample, reply: Mapping[str, Any], params: Mapping[str, Any], context: GenerationContext
) -> None:
    """Appends one /generate reply to the sample. Raises `EngineError` when its parts contradict each other."""
    meta = reply.get("meta_info") or {}
    entries = meta.get("output_token_logprobs")
    finish = meta.get("finish_reason") or {}
    kind = finish.get("type")
    if kind not in ("stop", "length", "abort"):
        raise EngineError(f"/generate for sample {sample.index}, got finish_reason {finish!r}: unknown to the protocol")
    if entries is None:
        if kind != "abort":
            raise EngineError(f"/generate for sample {sample.index}, got no output_token_logprobs: they were asked for")
        entries = []
    log_probs = [float(entry[0]) for entry in entries]
    token_ids = [int(entry[1]) for entry in entries]
    output_ids = reply.get("output_ids")
    if output_ids is not None and list(output_ids) != token_ids:
        raise EngineError(
            f"/generate for sample {sample.index}, got {len(output_ids)} output_ids and {len(token_ids)} log-probs "
            "that do not belong together"
        )
    text = str(reply.get("text", ""))
    # SGLang tests the length before the end token, so an answer whose end token is the last one allowed is reported
    # as cut off, with the end token in its text. It is complete.
    if kind == "length" and token_ids and token_ids[-1] in _end_tokens(params, context):
        kind = "stop"
        end = context.tokenizer.decode([token_ids[-1]])
        text = text.removesuffix(end) if end else text
    append_generated(sample, token_ids, log_probs, text)
    sample.status = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}[kind]
    sample.temperature = float(params.get("temperature", context.sampling.temperature))
    for version in weight_versions(meta):
        if sample.weight_versions[-1:] != [version]:
            sample.weight_versions.append(version)


def weight_versions(meta: Mapping[str, Any]) -> list[str]:
    """The versions that made an answer, oldest first."""
    spans = meta.get("weight_versions")
    if spans:
        return [str(span["version"]) for span in spans]
    version = meta.get("weight_version")
    return [] if version is None else [str(version)]


def _end_tokens(params: Mapping[str, Any], context: GenerationContext) -> frozenset[int]:
    if params.get("ignore_eos"):
        return frozenset()
    return context.runtime.eos_token_ids | frozenset(params.get("stop_token_ids") or ())
