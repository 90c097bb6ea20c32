"""Ready-made workloads: every file here is one, with a function `workload(**options)`; its name is the file's."""
