"""Graph to graph: loops, split norms, recomputing, order, lowering, cuts. Imports all other folders of passes."""
