"""The built-in strategies and gates and their names on the command line, in configs and in checkpoints."""

__all__ = ["GATES", "STRATEGIES"]

#: Names on the command line, in configs and in checkpoints, and the import path of each class.
STRATEGIES: dict[str, str] = {
    "agem": "bpn_lightning.strategies.gem:AveragedGEM",
    "bd": "bpn_lightning.strategies.bd:BeneficialPerturbation",
    "bitfit": "bpn_lightning.strategies.bitfit:BitFit",
    "der": "bpn_lightning.strategies.der:DarkExperienceReplay",
    "ebll": "bpn_lightning.strategies.ebll:EncoderBasedLifelongLearning",
    "er": "bpn_lightning.strategies.er:ExperienceReplay",
    "ewc": "bpn_lightning.strategies.ewc:EWC",
    "finetune": "bpn_lightning.strategies.finetune:FineTuning",
    "gdumb": "bpn_lightning.strategies.gdumb:GDumb",
    "gem": "bpn_lightning.strategies.gem:GradientEpisodicMemory",
    "ia3": "bpn_lightning.strategies.ia3:IA3",
    "icarl": "bpn_lightning.strategies.icarl:ICaRL",
    "imm": "bpn_lightning.strategies.imm:IncrementalMomentMatching",
    "joint": "bpn_lightning.strategies.joint:JointTraining",
    "lora": "bpn_lightning.strategies.lora:LoRA",
    "lwf": "bpn_lightning.strategies.lwf:LearningWithoutForgetting",
    "mas": "bpn_lightning.strategies.mas:MemoryAwareSynapses",
    "prompt": "bpn_lightning.strategies.prompt:PromptTuning",
    "psp": "bpn_lightning.strategies.psp:ParameterSuperposition",
    "si": "bpn_lightning.strategies.si:SynapticIntelligence",
    "slnid": "bpn_lightning.strategies.slnid:SLNID",
    "stl": "bpn_lightning.strategies.stl:IndependentNetworks",
}

#: What names the task of an input, by the same rule.
GATES: dict[str, str] = {
    "confidence": "bpn_lightning.strategies.gates.logits:Confidence",
    "energy": "bpn_lightning.strategies.gates.logits:Energy",
    "entropy": "bpn_lightning.strategies.gates.logits:Entropy",
    "fecam": "bpn_lightning.strategies.gates.fecam:FeCAM",
    "generative": "bpn_lightning.strategies.gates.generative:GenerativeClassifier",
    "ncm": "bpn_lightning.strategies.gates.ncm:NearestClassMean",
    "ppca": "bpn_lightning.strategies.gates.ppca:ProbabilisticPCA",
    "ranpac": "bpn_lightning.strategies.gates.ranpac:RanPAC",
    "slda": "bpn_lightning.strategies.gates.slda:SLDA",
    "supsup": "bpn_lightning.strategies.gates.supsup:SupSup",
}
