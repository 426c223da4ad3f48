"""Written by :mod:`tests.e2e.probe_capabilities`; :mod:`strategies.capabilities` says what it means."""

MADE_WITH = {"deepspeed": "0.19.8", "torch": "2.13.0+cpu"}

TABLE = """
0 bf16 bf16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
0 bf16 bf16 none 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 0 with ep 2 and gradients in bf16 is modelled only: the norm of FP16_UnfusedOptimizer leaves experts out
0 bf16 bf16 none 1f1b | full+split,none | T.... | runs DeepSpeedEngine FP16_UnfusedOptimizer
0 bf16 bf16 none 1f1b | full,none | ..... | runs DeepSpeedEngine FP16_UnfusedOptimizer
0 bf16 bf16 none 1f1b | none | ...S. T..S. | runs DeepSpeedEngine FP16_UnfusedOptimizer
0 bf16 bf16 none 1f1b | full,none | .P... | runs PipelineEngine BF16_Optimizer
0 bf16 bf16 none 1f1b | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs PipelineEngine BF16_Optimizer
0 bf16 bf16 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
0 bf16 bf16 none dualpipev | full,none | .P... | runs DualPipeVEngine BF16_Optimizer
0 bf16 bf16 none dualpipev | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs DualPipeVEngine BF16_Optimizer
0 bf16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
0 bf16 fp32 none 1f1b | full+split,none | T.... | refused unsupported mix of model_dtype=torch.bfloat16 and grad_accum_dtype=torch.float32
0 bf16 fp32 none 1f1b | full,none | ..... .P... | refused unsupported mix of model_dtype=torch.bfloat16 and grad_accum_dtype=torch.float32
0 bf16 fp32 none 1f1b | none | ...S. ..E.. ..ES. .P.S. .PE.. .PES. T..S. T.E.. T.ES. TP... TP.S. TPE.. TPES. | refused unsupported mix of model_dtype=torch.bfloat16 and grad_accum_dtype=torch.float32
0 bf16 fp32 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
0 bf16 fp32 none dualpipev | full,none | .P... | refused unsupported mix of model_dtype=torch.bfloat16 and grad_accum_dtype=torch.float32
0 bf16 fp32 none dualpipev | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | refused unsupported mix of model_dtype=torch.bfloat16 and grad_accum_dtype=torch.float32
0 fp16 fp16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
0 fp16 fp16 none 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused phalanx: zero_stage 0 with ep 2 and gradients in fp16 is modelled only: the norm of FP16_UnfusedOptimizer leaves experts out
0 fp16 fp16 none 1f1b | full+split,none | T.... | runs DeepSpeedEngine FP16_UnfusedOptimizer
0 fp16 fp16 none 1f1b | full,none | ..... | runs DeepSpeedEngine FP16_UnfusedOptimizer
0 fp16 fp16 none 1f1b | none | ...S. T..S. | runs DeepSpeedEngine FP16_UnfusedOptimizer
0 fp16 fp16 none 1f1b | full,none | .P... | runs PipelineEngine FP16_UnfusedOptimizer
0 fp16 fp16 none 1f1b | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs PipelineEngine FP16_UnfusedOptimizer
0 fp16 fp16 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
0 fp16 fp16 none dualpipev | full,none | .P... | runs DualPipeVEngine FP16_UnfusedOptimizer
0 fp16 fp16 none dualpipev | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs DualPipeVEngine FP16_UnfusedOptimizer
0 fp16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
0 fp16 fp32 none 1f1b | full+split,none | T.... | refused unsupported mix of model_dtype=torch.float16 and grad_accum_dtype=torch.float32
0 fp16 fp32 none 1f1b | full,none | ..... .P... | refused unsupported mix of model_dtype=torch.float16 and grad_accum_dtype=torch.float32
0 fp16 fp32 none 1f1b | none | ...S. ..E.. ..ES. .P.S. .PE.. .PES. T..S. T.E.. T.ES. TP... TP.S. TPE.. TPES. | refused unsupported mix of model_dtype=torch.float16 and grad_accum_dtype=torch.float32
0 fp16 fp32 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
0 fp16 fp32 none dualpipev | full,none | .P... | refused unsupported mix of model_dtype=torch.float16 and grad_accum_dtype=torch.float32
0 fp16 fp32 none dualpipev | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | refused unsupported mix of model_dtype=torch.float16 and grad_accum_dtype=torch.float32
0 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
0 fp32 fp32 none 1f1b | full,none,selective | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC | refused phalanx: cp 2: context parallelism is modelled only
0 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine AdamW
0 fp32 fp32 none 1f1b | full,none,selective | ..... ...S. ..E.. ..ES. | runs DeepSpeedEngine AdamW
0 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | TP... TP.S. TPE.. TPES. | runs PipelineEngine AdamW
0 fp32 fp32 none 1f1b | full,none,selective | .P... .P.S. .PE.. .PES. | runs PipelineEngine AdamW
0 fp32 fp32 none dualpipev | full,full+split,none,none+split,selective,selective+split | TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
0 fp32 fp32 none dualpipev | full,none,selective | .P..C .P.SC .PE.C .PESC | refused phalanx: cp 2: context parallelism is modelled only
0 fp32 fp32 none dualpipev | full,full+split,none,none+split,selective,selective+split | TP... TP.S. TPE.. TPES. | runs DualPipeVEngine AdamW
0 fp32 fp32 none dualpipev | full,none,selective | .P... .P.S. .PE.. .PES. | runs DualPipeVEngine AdamW
1 bf16 bf16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 bf16 bf16 none 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 bf16 bf16 none 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 bf16 bf16 none 1f1b | none | ...S. ..E.. ..ES. T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 bf16 bf16 none 1f1b | full,none | .P... | runs PipelineEngine DeepSpeedZeroOptimizer
1 bf16 bf16 none 1f1b | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs PipelineEngine DeepSpeedZeroOptimizer
1 bf16 bf16 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 bf16 bf16 none dualpipev | full,none | .P... | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 bf16 bf16 none dualpipev | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 bf16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 bf16 fp32 none 1f1b | full+split,none | T.... | runs DeepSpeedEngine BF16_Optimizer
1 bf16 fp32 none 1f1b | full,none | ..... | runs DeepSpeedEngine BF16_Optimizer
1 bf16 fp32 none 1f1b | none | ...S. ..E.. ..ES. T..S. T.E.. T.ES. | runs DeepSpeedEngine BF16_Optimizer
1 bf16 fp32 none 1f1b | full,none | .P... | runs PipelineEngine BF16_Optimizer
1 bf16 fp32 none 1f1b | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs PipelineEngine BF16_Optimizer
1 bf16 fp32 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 bf16 fp32 none dualpipev | full,none | .P... | runs DualPipeVEngine BF16_Optimizer
1 bf16 fp32 none dualpipev | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs DualPipeVEngine BF16_Optimizer
1 bf16 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 bf16 fp32 optimizer 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 bf16 fp32 optimizer 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 bf16 fp32 optimizer 1f1b | none | ...S. ..E.. ..ES. T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 bf16 fp32 optimizer 1f1b | full,none | .P... | runs PipelineEngine DeepSpeedZeroOptimizer
1 bf16 fp32 optimizer 1f1b | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs PipelineEngine DeepSpeedZeroOptimizer
1 bf16 fp32 optimizer dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 bf16 fp32 optimizer dualpipev | full,none | .P... | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 bf16 fp32 optimizer dualpipev | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp16 fp16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 fp16 fp16 none 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp16 fp16 none 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp16 fp16 none 1f1b | none | ...S. ..E.. ..ES. T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp16 fp16 none 1f1b | full,none | .P... | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp16 fp16 none 1f1b | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp16 fp16 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 fp16 fp16 none dualpipev | full,none | .P... | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp16 fp16 none dualpipev | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 fp16 fp32 none 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp16 fp32 none 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp16 fp32 none 1f1b | none | ...S. ..E.. ..ES. T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp16 fp32 none 1f1b | full,none | .P... | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp16 fp32 none 1f1b | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp16 fp32 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 fp16 fp32 none dualpipev | full,none | .P... | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp16 fp32 none dualpipev | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp16 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 fp16 fp32 optimizer 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp16 fp32 optimizer 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp16 fp32 optimizer 1f1b | none | ...S. ..E.. ..ES. T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp16 fp32 optimizer 1f1b | full,none | .P... | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp16 fp32 optimizer 1f1b | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp16 fp32 optimizer dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 fp16 fp32 optimizer dualpipev | full,none | .P... | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp16 fp32 optimizer dualpipev | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 fp32 fp32 none 1f1b | full,none,selective | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC | refused phalanx: cp 2: context parallelism is modelled only
1 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp32 fp32 none 1f1b | full,none,selective | ..... ...S. ..E.. ..ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | TP... TP.S. TPE.. TPES. | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp32 fp32 none 1f1b | full,none,selective | .P... .P.S. .PE.. .PES. | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp32 fp32 none dualpipev | full,full+split,none,none+split,selective,selective+split | TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 fp32 fp32 none dualpipev | full,none,selective | .P..C .P.SC .PE.C .PESC | refused phalanx: cp 2: context parallelism is modelled only
1 fp32 fp32 none dualpipev | full,full+split,none,none+split,selective,selective+split | TP... TP.S. TPE.. TPES. | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp32 fp32 none dualpipev | full,none,selective | .P... .P.S. .PE.. .PES. | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp32 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 fp32 fp32 optimizer 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp32 fp32 optimizer 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp32 fp32 optimizer 1f1b | none | ...S. ..E.. ..ES. T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp32 fp32 optimizer 1f1b | full,none | .P... | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp32 fp32 optimizer 1f1b | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp32 fp32 optimizer dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
1 fp32 fp32 optimizer dualpipev | full,none | .P... | runs DualPipeVEngine DeepSpeedZeroOptimizer
1 fp32 fp32 optimizer dualpipev | none | .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | runs DualPipeVEngine DeepSpeedZeroOptimizer
2 bf16 bf16 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 bf16 bf16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
2 bf16 bf16 none 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 bf16 bf16 none 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 bf16 bf16 none 1f1b | none | ...S. ..E.. ..ES. T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 bf16 bf16 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 bf16 bf16 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
2 bf16 fp32 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 bf16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
2 bf16 fp32 none 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 bf16 fp32 none 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 bf16 fp32 none 1f1b | none | ...S. ..E.. ..ES. T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 bf16 fp32 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 bf16 fp32 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
2 bf16 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
2 bf16 fp32 optimizer 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 bf16 fp32 optimizer 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 bf16 fp32 optimizer 1f1b | none | ...S. ..E.. ..ES. T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp16 fp16 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 fp16 fp16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
2 fp16 fp16 none 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp16 fp16 none 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp16 fp16 none 1f1b | none | ...S. ..E.. ..ES. T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp16 fp16 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 fp16 fp16 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
2 fp16 fp32 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 fp16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
2 fp16 fp32 none 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp16 fp32 none 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp16 fp32 none 1f1b | none | ...S. ..E.. ..ES. T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp16 fp32 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 fp16 fp32 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
2 fp16 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
2 fp16 fp32 optimizer 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp16 fp32 optimizer 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp16 fp32 optimizer 1f1b | none | ...S. ..E.. ..ES. T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp32 fp32 none 1f1b | none | .P... .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
2 fp32 fp32 none 1f1b | full,none,selective | ....C ...SC ..E.C ..ESC | refused phalanx: cp 2: context parallelism is modelled only
2 fp32 fp32 none 1f1b | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
2 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T.... T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp32 fp32 none 1f1b | full,none,selective | ..... ...S. ..E.. ..ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp32 fp32 none dualpipev | none | .P... .P.S. .PE.. .PES. TP... TP.S. TPE.. TPES. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 fp32 fp32 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
2 fp32 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
2 fp32 fp32 optimizer 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp32 fp32 optimizer 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp32 fp32 optimizer 1f1b | none | ...S. ..E.. ..ES. T..S. T.E.. T.ES. | runs DeepSpeedEngine DeepSpeedZeroOptimizer
3 bf16 bf16 none 1f1b | none | ..E.. ..ES. .PE.. .PES. T.E.. T.ES. TPE.. TPES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 bf16 bf16 none 1f1b | none | .P... .P.S. TP... TP.S. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 bf16 bf16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 bf16 none 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 bf16 none 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 bf16 none 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 bf16 none dualpipev | none | .PE.. .PES. TPE.. TPES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 bf16 bf16 none dualpipev | none | .P... .P.S. TP... TP.S. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 bf16 bf16 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 fp32 none 1f1b | none | ..E.. ..ES. .PE.. .PES. T.E.. T.ES. TPE.. TPES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 bf16 fp32 none 1f1b | none | .P... .P.S. TP... TP.S. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 bf16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 fp32 none 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 none 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 none 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 none dualpipev | none | .PE.. .PES. TPE.. TPES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 bf16 fp32 none dualpipev | none | .P... .P.S. TP... TP.S. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 bf16 fp32 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 fp32 optimizer 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 bf16 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 fp32 optimizer 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 optimizer 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 optimizer 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 optimizer+params 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 bf16 fp32 optimizer+params 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 fp32 optimizer+params 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 optimizer+params 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 optimizer+params 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 optimizer+params@nvme 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 bf16 fp32 optimizer+params@nvme 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 fp32 optimizer+params@nvme 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 optimizer+params@nvme 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 optimizer+params@nvme 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 optimizer@nvme 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 bf16 fp32 optimizer@nvme 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
3 bf16 fp32 optimizer@nvme 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 optimizer@nvme 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 optimizer@nvme 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp16 none 1f1b | none | ..E.. ..ES. .PE.. .PES. T.E.. T.ES. TPE.. TPES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp16 fp16 none 1f1b | none | .P... .P.S. TP... TP.S. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 fp16 fp16 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp16 none 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp16 none 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp16 none 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp16 none dualpipev | none | .PE.. .PES. TPE.. TPES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp16 fp16 none dualpipev | none | .P... .P.S. TP... TP.S. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 fp16 fp16 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp32 none 1f1b | none | ..E.. ..ES. .PE.. .PES. T.E.. T.ES. TPE.. TPES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp16 fp32 none 1f1b | none | .P... .P.S. TP... TP.S. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 fp16 fp32 none 1f1b | none | ....C ...SC ..E.C ..ESC .P..C .P.SC .PE.C .PESC T...C T..SC T.E.C T.ESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp32 none 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 none 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 none 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 none dualpipev | none | .PE.. .PES. TPE.. TPES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp16 fp32 none dualpipev | none | .P... .P.S. TP... TP.S. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 fp16 fp32 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp32 optimizer 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp16 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp32 optimizer 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 optimizer 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 optimizer 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 optimizer+params 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp16 fp32 optimizer+params 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp32 optimizer+params 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 optimizer+params 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 optimizer+params 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 optimizer+params@nvme 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp16 fp32 optimizer+params@nvme 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp32 optimizer+params@nvme 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 optimizer+params@nvme 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 optimizer+params@nvme 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 optimizer@nvme 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp16 fp32 optimizer@nvme 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp16 fp32 optimizer@nvme 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 optimizer@nvme 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp16 fp32 optimizer@nvme 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T.E.. T.ES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp32 fp32 none 1f1b | full,none,selective | ..E.. ..ES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp32 fp32 none 1f1b | none | .PE.. .PES. TPE.. TPES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp32 fp32 none 1f1b | none | .P... .P.S. TP... TP.S. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 none 1f1b | full,none,selective | ....C ...SC ..E.C ..ESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 none 1f1b | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 none 1f1b | full,full+split,none,none+split,selective,selective+split | T.... T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 none 1f1b | full,none,selective | ..... ...S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 none dualpipev | none | .PE.. .PES. TPE.. TPES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp32 fp32 none dualpipev | none | .P... .P.S. TP... TP.S. | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 fp32 fp32 none dualpipev | none | .P..C .P.SC .PE.C .PESC TP..C TP.SC TPE.C TPESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 optimizer 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp32 fp32 optimizer 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 optimizer 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 optimizer 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 optimizer 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 optimizer+params 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp32 fp32 optimizer+params 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 optimizer+params 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 optimizer+params 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 optimizer+params 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 optimizer+params@nvme 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp32 fp32 optimizer+params@nvme 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 optimizer+params@nvme 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 optimizer+params@nvme 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 optimizer+params@nvme 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 optimizer@nvme 1f1b | none | ..E.. ..ES. T.E.. T.ES. | refused Native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP or choose ZeRO stage 1/2.
3 fp32 fp32 optimizer@nvme 1f1b | none | ....C ...SC ..E.C ..ESC T...C T..SC T.E.C T.ESC | refused phalanx: cp 2: context parallelism is modelled only
3 fp32 fp32 optimizer@nvme 1f1b | full+split,none | T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 optimizer@nvme 1f1b | full,none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 optimizer@nvme 1f1b | none | ...S. T..S. | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
"""  # noqa: E501
