"""The embedded engine: an inference server that speaks SGLang's HTTP protocol, on a CPU or one GPU, with torch alone.

    HTTP request -> requests (parse) -> scheduler (decode thread) -> replies (JSON)
                                          |  model    functional forward over fused weights
                                          |  cache    keys and values of the running rows
                                          |  sampling counter-based randomness, log-probs
                                          |  weights  HF names <-> live parameters, updates, checksums

`python -m miles.engines.embedded --model-path DIR --port 0` starts it; see `options` for the flags. The HTTP side runs in
the main thread (asyncio), everything that touches a tensor in the decode thread.
"""
