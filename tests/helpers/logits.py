"""Run as a script, in a process of its own since DeepSpeed keeps state: logits of a model that get_ds_model loads.

python logits.py OUT.pt '{"model_name": …, …}'
"""

import json
import sys

import torch
from families import IDS


def main() -> None:
    from zi_experiments import get_ds_model

    out, arguments = sys.argv[1], json.loads(sys.argv[2])
    with torch.no_grad():
        model = get_ds_model(**arguments)
        logits = model(IDS).logits
        tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
        again = model(IDS).logits
    on_disk = [p.ds_tensor.final_location is not None for p in model.parameters()]
    if torch.distributed.get_rank():
        return
    torch.save({"logits": logits, "again": again, "tokens": tokens, "on_disk": sum(on_disk)}, out)


if __name__ == "__main__":
    main()
