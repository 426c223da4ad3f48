"""Written by :mod:`tests.e2e.probe_capabilities`; :mod:`strategies.capabilities` says what it means."""

TABLE = """
0 bf16 bf16 none 1f1b | none | ..... T.... | runs DeepSpeedEngine FP16_UnfusedOptimizer
0 bf16 bf16 none 1f1b | none | .P... TP... | runs PipelineEngine BF16_Optimizer
0 bf16 fp32 none 1f1b | none | ..... .P... T.... TP... | refused unsupported mix of model_dtype=torch.bfloat16 and grad_accum_dtype=torch.float32
0 fp32 fp32 none 1f1b | full,none,selective | ..... T.... | runs DeepSpeedEngine AdamW
0 fp32 fp32 none 1f1b | full,none,selective | .P... TP... | runs PipelineEngine AdamW
1 bf16 bf16 none 1f1b | none | ..... T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 bf16 bf16 none 1f1b | none | .P... TP... | runs PipelineEngine DeepSpeedZeroOptimizer
1 bf16 fp32 none 1f1b | none | ..... T.... | runs DeepSpeedEngine BF16_Optimizer
1 bf16 fp32 none 1f1b | none | .P... TP... | runs PipelineEngine BF16_Optimizer
1 fp16 fp32 none 1f1b | none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp32 fp32 none 1f1b | full,none,selective | ..... T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp32 fp32 none 1f1b | full,none,selective | .P... TP... | runs PipelineEngine DeepSpeedZeroOptimizer
1 fp32 fp32 optimizer 1f1b | none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 bf16 bf16 none 1f1b | none | .P... TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 bf16 bf16 none 1f1b | none | ..... T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 bf16 fp32 none 1f1b | none | .P... TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 bf16 fp32 none 1f1b | none | ..... T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 bf16 fp32 optimizer 1f1b | none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp16 fp32 optimizer 1f1b | none | ..... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp32 fp32 none 1f1b | none | .P... TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 fp32 fp32 none 1f1b | full,none,selective | ..... T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer
3 bf16 bf16 none 1f1b | none | .P... TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 bf16 bf16 none 1f1b | none | ..... T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 none 1f1b | none | .P... TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 bf16 fp32 none 1f1b | none | ..... T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 none 1f1b | none | .P... TP... | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 fp32 fp32 none 1f1b | full,none,selective | ..... T.... | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
"""  # noqa: E501
