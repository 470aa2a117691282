"""The built-in strategies and their names on the command line, in configs and in checkpoints."""

__all__ = ["STRATEGIES"]

#: Names on the command line, in configs and in checkpoints, and the import path of each class.
STRATEGIES: dict[str, str] = {
    "agem": "bpn_lightning.strategies.gem:AveragedGEM",
    "bd": "bpn_lightning.strategies.bd:BeneficialPerturbation",
    "ebll": "bpn_lightning.strategies.ebll:EncoderBasedLifelongLearning",
    "ewc": "bpn_lightning.strategies.ewc:EWC",
    "finetune": "bpn_lightning.strategies.finetune:FineTuning",
    "gem": "bpn_lightning.strategies.gem:GradientEpisodicMemory",
    "imm": "bpn_lightning.strategies.imm:IncrementalMomentMatching",
    "joint": "bpn_lightning.strategies.joint:JointTraining",
    "lwf": "bpn_lightning.strategies.lwf:LearningWithoutForgetting",
    "mas": "bpn_lightning.strategies.mas:MemoryAwareSynapses",
    "psp": "bpn_lightning.strategies.psp:ParameterSuperposition",
    "si": "bpn_lightning.strategies.si:SynapticIntelligence",
    "slnid": "bpn_lightning.strategies.slnid:SLNID",
    "stl": "bpn_lightning.strategies.stl:IndependentNetworks",
}
