# The base model that tools/make_tiny_task.py makes: Qwen3 at 0.4 M parameters.
# shellcheck shell=bash disable=SC2034
MODEL_ARGS=(
  --num-layers 2
  --hidden-size 128
  --ffn-hidden-size 384
  --num-attention-heads 4
  --group-query-attention
  --num-query-groups 2
  --kv-channels 32
  --qk-layernorm
  --swiglu
  --normalization RMSNorm
  --norm-epsilon 1e-6
  --use-rotary-position-embeddings
  --rotary-base 10000
  --disable-bias-linear
  --vocab-size 104
)
