"""Space, proposal, allocation, Pareto, ablation: plain data in, plain data out. Imports no torch."""
