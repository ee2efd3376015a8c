"""A base model and a task so small that two CPU cores show reinforcement learning at work in about a minute.

    problems.py    the 8,100 additions, the split, the careless teacher
    base_model.py  a 0.4 M parameter Qwen3 and its character tokenizer
    muon.py        the optimizer of its weight matrices
    sft.py         supervised training on the careless teacher's answers: the "base model"
    making.py      model, tokenizer and prompt files in one directory, made once, whole or not at all
    preferences.py pairs of a right and a careless answer, and judged answers
    accuracy.py    an independent score, by plain Hugging Face generation

The task is `a+b=` with two-digit a and b. The teacher answers rightly four times in ten; six times it adds digit by
digit and drops every carry. The model therefore knows both ways to add and prefers the wrong one; an exact-match reward
makes it prefer the right one.

What this can show: that rewards, advantages, losses, the optimizer, weight updates and the engine work together.
RL here re-weights two behaviours that supervised training put into the model. What it cannot show: that RL finds a
behaviour the model does not have, or anything about large models. Judge a run by *sampled* accuracy. Greedy accuracy
starts between the two behaviours and drifts even under a random reward.

Nothing here imports ray, megatron or miles: the starting point does not depend on what it tests.
"""
