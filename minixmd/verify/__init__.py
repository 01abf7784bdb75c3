"""python -m minixmd.verify MODEL: prove a checkpoint on this machine."""
