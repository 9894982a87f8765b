"""Code that the bundles share, laid out like MONAI's own sub-packages.

- ``data``: the shard schema, slabs, training samples, embeddings
- ``engines``: pretraining and the grid of probes, as MONAI/Ignite engines
- ``handlers``: checkpoints, MLflow, progress, results
- ``inferers``: a 2D encoder over the slices of a volume
- ``labels``: class lists with names, codes and positive weights
- ``losses``: SIGReg, LeJEPA (Eq. 1), auxiliary supervision (Eq. 2)
- ``metrics``: multi-label scores, effective rank
- ``networks``: encoder, heads, poolers, probes
- ``optimizers``: AdamW and its schedule
- ``reports``: pages for people
- ``transforms``: orientation, HU window, body crop, views, soft labels
"""

__version__ = "0.1.0"
