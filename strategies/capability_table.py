"""Written by :mod:`tests.e2e.probe_capabilities`; :mod:`strategies.capabilities` says what it means."""

MADE_WITH = {"deepspeed": "0.19.8", "torch": "2.13.0+cpu"}

TABLE = """
0 bf16 bf16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
0 bf16 bf16 none 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 0 with ep 2 and gradients in bf16 is modelled only
0 bf16 bf16 none 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine FP16_UnfusedOptimizer
0 bf16 bf16 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs PipelineEngine BF16_Optimizer
0 bf16 bf16 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
0 bf16 bf16 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs DualPipeVEngine BF16_Optimizer
0 bf16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
0 bf16 fp32 none 1f1b | none | ..... ...S. ..E.. ..ES. .P... .P.S. .PE.. .PES. T.... T..S. T.E.. T.ES. TP... TPE.. | refused unsupported mix of model_dtype=torch.bfloat16 and grad_accum_dtype=torch.float32
0 bf16 fp32 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
0 bf16 fp32 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | refused unsupported mix of model_dtype=torch.bfloat16 and grad_accum_dtype=torch.float32
0 fp16 fp16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
0 fp16 fp16 none 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 0 with ep 2 and gradients in fp16 is modelled only
0 fp16 fp16 none 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine FP16_UnfusedOptimizer
0 fp16 fp16 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs PipelineEngine FP16_UnfusedOptimizer
0 fp16 fp16 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
0 fp16 fp16 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs DualPipeVEngine FP16_UnfusedOptimizer
0 fp16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
0 fp16 fp32 none 1f1b | none | ..... ...S. ..E.. ..ES. .P... .P.S. .PE.. .PES. T.... T..S. T.E.. T.ES. TP... TPE.. | refused unsupported mix of model_dtype=torch.float16 and grad_accum_dtype=torch.float32
0 fp16 fp32 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
0 fp16 fp32 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | refused unsupported mix of model_dtype=torch.float16 and grad_accum_dtype=torch.float32
0 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
0 fp32 fp32 none 1f1b | full,none,selective | ....C ...SC ..E.C ..ESC .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
0 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine AdamW
0 fp32 fp32 none 1f1b | full,none,selective | ..... ...S. ..E.. ..ES. | runs DeepSpeedEngine AdamW
0 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | TP... TPE.. | runs PipelineEngine AdamW
0 fp32 fp32 none 1f1b | full,none,selective | .P... .P.S. .PE.. .PES. | runs PipelineEngine AdamW
0 fp32 fp32 none dualpipev | full,none,selective | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
0 fp32 fp32 none dualpipev | full,full+split,none,none+split,selective,selective+split | TP... TPE.. | runs DualPipeVEngine AdamW
0 fp32 fp32 none dualpipev | full,none,selective | .P... .P.S. .PE.. .PES. | runs DualPipeVEngine AdamW
1 bf16 bf16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
1 bf16 bf16 none 1f1b | none | ..... ...S. ..E.. ..ES. T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 bf16 bf16 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs PipelineEngine DeepSpeedZeroOptimizer
1 bf16 bf16 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
1 bf16 bf16 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 bf16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
1 bf16 fp32 none 1f1b | none | ..... ...S. ..E.. ..ES. T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine BF16_Optimizer
1 bf16 fp32 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs PipelineEngine BF16_Optimizer
1 bf16 fp32 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
1 bf16 fp32 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs DualPipeVEngine BF16_Optimizer
1 bf16 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
1 bf16 fp32 optimizer 1f1b | none | ..... ...S. ..E.. ..ES. T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 bf16 fp32 optimizer 1f1b | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs PipelineEngine DeepSpeedZeroOptimizer
1 bf16 fp32 optimizer dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
1 bf16 fp32 optimizer dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp16 fp16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
1 fp16 fp16 none 1f1b | none | ..... ...S. ..E.. ..ES. T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp16 fp16 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp16 fp16 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
1 fp16 fp16 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
1 fp16 fp32 none 1f1b | none | ..... ...S. ..E.. ..ES. T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp16 fp32 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp16 fp32 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
1 fp16 fp32 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp16 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
1 fp16 fp32 optimizer 1f1b | none | ..... ...S. ..E.. ..ES. T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp16 fp32 optimizer 1f1b | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp16 fp32 optimizer dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
1 fp16 fp32 optimizer dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
1 fp32 fp32 none 1f1b | full,none,selective | ....C ...SC ..E.C ..ESC .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
1 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp32 fp32 none 1f1b | full,none,selective | ..... ...S. ..E.. ..ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | TP... TPE.. | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp32 fp32 none 1f1b | full,none,selective | .P... .P.S. .PE.. .PES. | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp32 fp32 none dualpipev | full,none,selective | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
1 fp32 fp32 none dualpipev | full,full+split,none,none+split,selective,selective+split | TP... TPE.. | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp32 fp32 none dualpipev | full,none,selective | .P... .P.S. .PE.. .PES. | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp32 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
1 fp32 fp32 optimizer 1f1b | none | ..... ...S. ..E.. ..ES. T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp32 fp32 optimizer 1f1b | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp32 fp32 optimizer dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
1 fp32 fp32 optimizer dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | runs DualPipeVEngine DeepSpeedZeroOptimizer
2 bf16 bf16 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TPE.. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 bf16 bf16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
2 bf16 bf16 none 1f1b | none | ..... ...S. ..E.. ..ES. T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 bf16 bf16 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 bf16 bf16 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
2 bf16 fp32 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TPE.. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 bf16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
2 bf16 fp32 none 1f1b | none | ..... ...S. ..E.. ..ES. T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 bf16 fp32 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 bf16 fp32 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
2 bf16 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
2 bf16 fp32 optimizer 1f1b | none | ..... ...S. ..E.. ..ES. T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp16 fp16 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TPE.. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 fp16 fp16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
2 fp16 fp16 none 1f1b | none | ..... ...S. ..E.. ..ES. T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp16 fp16 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 fp16 fp16 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
2 fp16 fp32 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TPE.. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 fp16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
2 fp16 fp32 none 1f1b | none | ..... ...S. ..E.. ..ES. T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp16 fp32 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 fp16 fp32 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
2 fp16 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
2 fp16 fp32 optimizer 1f1b | none | ..... ...S. ..E.. ..ES. T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp32 fp32 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TPE.. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
2 fp32 fp32 none 1f1b | full,none,selective | ....C ...SC ..E.C ..ESC | refused phalanx: cp 2: context parallelism is modelled only
2 fp32 fp32 none 1f1b | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
2 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp32 fp32 none 1f1b | full,none,selective | ..... ...S. ..E.. ..ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp32 fp32 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TPE.. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 fp32 fp32 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
2 fp32 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
2 fp32 fp32 optimizer 1f1b | none | ..... ...S. ..E.. ..ES. T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
3 bf16 bf16 none 1f1b | none | .P... .P.S. TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 bf16 bf16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 bf16 none 1f1b | none | ..E.. ..ES. .PE.. .PES. T.E.. T.ES. TPE.. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 bf16 bf16 none 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 bf16 none dualpipev | none | .P... .P.S. TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 bf16 bf16 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 bf16 none dualpipev | none | .PE.. .PES. TPE.. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 bf16 fp32 none 1f1b | none | .P... .P.S. TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 bf16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 fp32 none 1f1b | none | ..E.. ..ES. .PE.. .PES. T.E.. T.ES. TPE.. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 bf16 fp32 none 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 none dualpipev | none | .P... .P.S. TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 bf16 fp32 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 fp32 none dualpipev | none | .PE.. .PES. TPE.. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 bf16 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 fp32 optimizer 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 bf16 fp32 optimizer 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 optimizer+params 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 fp32 optimizer+params 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 bf16 fp32 optimizer+params 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 optimizer+params@nvme 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 fp32 optimizer+params@nvme 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 bf16 fp32 optimizer+params@nvme 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 optimizer@nvme 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 fp32 optimizer@nvme 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 bf16 fp32 optimizer@nvme 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp16 none 1f1b | none | .P... .P.S. TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 fp16 fp16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp16 none 1f1b | none | ..E.. ..ES. .PE.. .PES. T.E.. T.ES. TPE.. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp16 fp16 none 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp16 none dualpipev | none | .P... .P.S. TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 fp16 fp16 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp16 none dualpipev | none | .PE.. .PES. TPE.. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp16 fp32 none 1f1b | none | .P... .P.S. TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 fp16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .PE.C T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp32 none 1f1b | none | ..E.. ..ES. .PE.. .PES. T.E.. T.ES. TPE.. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp16 fp32 none 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 none dualpipev | none | .P... .P.S. TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 fp16 fp32 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp32 none dualpipev | none | .PE.. .PES. TPE.. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp16 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp32 optimizer 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp16 fp32 optimizer 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 optimizer+params 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp32 optimizer+params 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp16 fp32 optimizer+params 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 optimizer+params@nvme 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp32 optimizer+params@nvme 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp16 fp32 optimizer+params@nvme 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 optimizer@nvme 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp32 optimizer@nvme 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp16 fp32 optimizer@nvme 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 none 1f1b | none | .P... .P.S. TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 none 1f1b | full,none,selective | ....C ...SC ..E.C ..ESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 none 1f1b | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T.E.. T.ES. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp32 fp32 none 1f1b | full,none,selective | ..E.. ..ES. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp32 fp32 none 1f1b | none | .PE.. .PES. TPE.. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 none 1f1b | full,none,selective | ..... ...S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 none dualpipev | none | .P... .P.S. TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 fp32 fp32 none dualpipev | none | .P..C .PE.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 none dualpipev | none | .PE.. .PES. TPE.. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp32 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 optimizer 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp32 fp32 optimizer 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 optimizer+params 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 optimizer+params 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp32 fp32 optimizer+params 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 optimizer+params@nvme 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 optimizer+params@nvme 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp32 fp32 optimizer+params@nvme 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 optimizer@nvme 1f1b | none | ....C ...SC ..E.C ..ESC T...C T.E.C | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 optimizer@nvme 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 3 with ep 2 is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas
3 fp32 fp32 optimizer@nvme 1f1b | none | ..... ...S. T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
"""  # noqa: E501
