"""Code that the bundles share, laid out like MONAI's own sub-packages.

- ``ct``: a CT file becomes HU slices the right way up, or is refused
- ``shards``: WebDataset shards of slices, and the slabs drawn from them
- ``embeddings``: embeddings of volumes: making, storing and reading them
- ``cohort``: who is in a cohort: classes, label tables, splits by patient
- ``run``: what every run shares: its options, its errors, its processes
- ``engines``: pretraining and the grid of probes, as MONAI/Ignite engines
- ``handlers``: checkpoints, MLflow, progress, results
- ``inferers``: a 2D encoder over the slices of a volume
- ``labels``: class lists with names, codes and positive weights, as CSV files
- ``losses``: SIGReg, LeJEPA (Eq. 1), auxiliary supervision (Eq. 2)
- ``metrics``: multi-label scores, effective rank
- ``networks``: encoder, heads, poolers, probes
- ``optimizers``: AdamW and its schedule
- ``reports``: pictures and pages for people
- ``transforms``: HU window, body crop, views, soft labels
"""

__version__ = "0.1.0"
