#!/usr/bin/env python3
"""DeepCompressor's and QServe's files as torch itself reads and writes them: oracle_torch.py QUATTUOR. Exit 77: skipped.

make_import.py writes torch archives without torch. Here torch reads them, and saves them again, with views and Parameters as real
checkpoints have them; what Quattuor makes of those must be the same integers."""
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
try:
    import torch
except ImportError:
    print("torch is not installed")
    sys.exit(77)
here = os.path.dirname(os.path.abspath(__file__))
spec = importlib.util.spec_from_file_location("make_import", os.path.join(here, "..", "golden", "make_import.py"))
make_import = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_import)

with tempfile.TemporaryDirectory() as t:
    for variant in [*make_import.FAKE, *(v for v in make_import.QSERVE if v != "qserve-safetensors")]:
        old, new, out = (os.path.join(t, variant + suffix) for suffix in ("", ".torch", ".out"))
        make_import.make(old, variant)
        shutil.copytree(old, new)
        for name in os.listdir(new):
            if not name.endswith((".pt", ".bin")):
                continue
            tensors = torch.load(os.path.join(new, name), weights_only=True)
            for i, (key, x) in enumerate(tensors.items()):
                if x is None:
                    continue
                if i % 3 == 1 and x.is_floating_point():
                    x = torch.nn.Parameter(x)
                if i % 3 == 2 and x.dim() == 2:  # a matrix that lies transposed, and one inside a larger storage
                    x = x.t().contiguous().t() if i % 2 else torch.cat([x, x])[:len(x)]
                tensors[key] = x
            torch.save(tensors, os.path.join(new, name))
        os.rename(old + ".expected", new + ".expected")
        subprocess.run([sys.argv[1], "convert", "--model", new, "--output", out], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(variant, end=": ", flush=True)
        make_import.check(new, out)
    model = os.path.join(t, "lmquant-g128")
    make_import.make(model, "lmquant-g128")
    make_import.acts(os.path.join(t, "acts"))
    for form in sorted(os.listdir(os.path.join(t, "acts"))):
        if form == "scales.json":
            continue
        source, ranges = os.path.join(t, "acts", form, "acts.pt"), os.path.join(t, form + ".pt")
        torch.save(torch.load(source, weights_only=True), ranges)
        written = []
        for path in (ranges, os.path.join(t, "acts", "scales.json")):
            out = os.path.join(t, f"{form}.{len(written)}.out")
            subprocess.run([sys.argv[1], "convert", "--model", model, "--output", out, "--kv-scales", path], check=True,
                           stdout=subprocess.DEVNULL)
            written.append(open(os.path.join(out, "model.safetensors"), "rb").read())
        assert written[0] == written[1], f"acts.pt, {form}: other scales"
        print(f"acts.pt, {form}: same scales")
