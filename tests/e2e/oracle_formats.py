#!/usr/bin/env python3
"""Every format that Quattuor writes, with and without static KV scales, against the reader that was written from the
specification (oracle_reader.py): oracle_formats.py QUATTUOR FLOAT_MODEL. Exit 77: skipped."""
import json
import os
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
try:
    import numpy as np
except ImportError:
    print("numpy is not installed")
    sys.exit(77)
from oracle_reader import Model

quattuor, source = sys.argv[1:3]
if not os.path.exists(os.path.join(source, "model.safetensors")):
    print("no float model here to quantise")
    sys.exit(77)
layers = json.load(open(os.path.join(source, "config.json")))["num_hidden_layers"]
with tempfile.TemporaryDirectory() as t:
    scales = {"kv_cache": {"dtype": "int8", "scaling_factor": {
        k: {str(i): round(0.01 * (i + 1) * f, 6) for i in range(layers)} for k, f in (("k_scale", 3), ("v_scale", 1))}}}
    json.dump(scales, open(os.path.join(t, "kv.json"), "w"))
    for precision, group, most in (("w4a8kv4", 128, 0.11), ("w4a8kv8", -1, 0.14), ("w8a8kv8", -1, 0.01), ("w16a16kv8", 0, 0.001)):
        for kv in (False, True):
            out = os.path.join(t, f"{precision}{group}{kv}")
            command = [quattuor, "convert", "--model", source, "--output", out, "--precision", precision]
            command += ["--group-size", str(group)] * (group != 0) + ["--kv-scales", os.path.join(t, "kv.json")] * kv
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            model = Model(out)
            model.check(kv_scales=kv)
            error = model.compare(source)
            assert error < most, f"{precision}, group {group}: {error}"
            for i in range(layers if kv else 0):
                got = model.tensors[f"model.layers.{i}.self_attn.kv_scale_quant_orig"]
                want = [scales["kv_cache"]["scaling_factor"][k][str(i)] for k in ("k_scale", "v_scale")]
                assert (got == np.array(want, np.float32)).all()
            print(f"{precision}, group {group}, {'with' if kv else 'without'} KV scales: relative error {error:.5f}")
