"""The training loop, and what it alone needs: data order, checkpoints, progress, the card."""
