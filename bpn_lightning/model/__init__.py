"""The network, its modes, and the LightningModule that learns a stream."""
