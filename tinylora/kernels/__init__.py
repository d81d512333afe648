"""Operations of the engine, one per file. They know weights, A, B, M and rows; they never see v, P or tying."""
