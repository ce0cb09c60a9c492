"""The protocols: f2rt.v1 and KServe v2 over gRPC, OpenAI over HTTP. Each translates; none owns an engine."""
