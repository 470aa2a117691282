"""A bundle over HTTP: LitServe's server, batches and queues around :mod:`bpn_lightning.modes`."""
