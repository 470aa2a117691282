"""The strategies that have a name: on the command line, in configs and in checkpoints."""

__all__ = ["STRATEGIES"]

#: Names on the command line, in configs and in checkpoints, and where the class is.
STRATEGIES: dict[str, str] = {
    "agem": "bpn_lightning.strategies.gem:AveragedGEM",
    "bd": "bpn_lightning.strategies.beneficial:BeneficialPerturbation",
    "ebll": "bpn_lightning.strategies.ebll:EncoderBasedLifelongLearning",
    "ewc": "bpn_lightning.strategies.ewc:EWC",
    "finetune": "bpn_lightning.strategies.finetuning:FineTuning",
    "gem": "bpn_lightning.strategies.gem:GradientEpisodicMemory",
    "imm": "bpn_lightning.strategies.imm:IncrementalMomentMatching",
    "joint": "bpn_lightning.strategies.joint:JointTraining",
    "lwf": "bpn_lightning.strategies.lwf:LearningWithoutForgetting",
    "mas": "bpn_lightning.strategies.memory_aware_synapses:MemoryAwareSynapses",
    "psp": "bpn_lightning.strategies.superposition:ParameterSuperposition",
    "si": "bpn_lightning.strategies.synaptic_intelligence:SynapticIntelligence",
    "slnid": "bpn_lightning.strategies.slnid:SLNID",
    "stl": "bpn_lightning.strategies.independent:IndependentNetworks",
}
