#!/usr/bin/env python3
"""Small torch.save archives of every kind the reader meets, made once: make_torch.py (needs torch).

Writes <name>.bin beside this file, and expected.json: name -> null for archives that must be refused, or tensor -> {"dtype",
"shape", "values"} (values flattened, row major).
"""
import collections
import json
import os

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int8: "I8",
         torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL"}
expected = {}


def describe(tensors):
    return {k: {"dtype": NAMES[v.dtype], "shape": list(v.shape), "values": [float(x) for x in v.detach().flatten()]}
            for k, v in tensors.items()}


def save(name, obj, tensors, **how):
    torch.save(obj, os.path.join(HERE, name + ".bin"), **how)
    expected[name] = describe(tensors) if tensors is not None else None


a = torch.arange(24, dtype=torch.float32).reshape(4, 6) - 7.5
types = {str(t).split(".")[1]: (a * 2).to(t) for t in NAMES}
save("dtypes", types, types)
save("protocol4", types, types, pickle_protocol=4)

# views: transposed, a window, an offset, one scalar, an empty one, a dimension of one with an odd stride
views = collections.OrderedDict(whole=a, transposed=a.t(), window=a[1:3, 2:5], row=a[2], column=a[:, 1], scalar=a[1, 1],
                                empty=a[:0], one=a[:, 1:2], deep=a.reshape(2, 2, 3, 2).permute(3, 1, 0, 2))
save("views", views, views)

# what nn.Module.state_dict gives: an OrderedDict with _metadata; and bare parameters
module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).half()
torch.manual_seed(1)
for p in module.parameters():
    torch.nn.init.normal_(p)
save("module", module.state_dict(), module.state_dict())
parameters = {k: torch.nn.Parameter(v) for k, v in module.state_dict().items()}
save("parameters", parameters, parameters)
save("nested", {"epoch": 3, "lr": 0.5, "note": "état", "done": None, "sizes": [1, (2, 3)], "big": 1 << 40,
                "state_dict": module.state_dict()}, module.state_dict())

# a layer as OmniServe's converter writes it
qserve = {}
for p in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
          "mlp.down_proj"):
    p = "model.layers.0." + p
    qserve[p + ".qweight"] = torch.randint(-128, 128, (32, 16), dtype=torch.int8)
    qserve[p + ".s1_scales"] = torch.rand(32, dtype=torch.float16)
    qserve[p + ".s1_szeros"] = torch.rand(32, dtype=torch.float16)
save("qserve", qserve, qserve)

# to be refused
save("legacy", types, None, _use_new_zipfile_serialization=False)
save("list", [a], None)
save("whole-module", module, None)


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


save("evil", {"a": a, "b": Evil()}, None)
with open(os.path.join(HERE, "expected.json"), "w") as f:
    json.dump(expected, f, indent=0)
    f.write("\n")
