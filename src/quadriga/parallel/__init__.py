"""Training and inference by several processes: groups, meshes and the parts of each rank; and workers that share weights."""
