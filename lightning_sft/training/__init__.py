"""The LightningModule, its callbacks and checkpoints, and LightningCLI around them."""
