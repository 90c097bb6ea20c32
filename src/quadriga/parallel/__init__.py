"""Training and inference by several processes, on torch.distributed: groups, meshes, plans and the parts of each rank."""
