"""Two checkpoints side by side: numbers, graphs, and a page that draws their residual streams."""
