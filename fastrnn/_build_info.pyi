version: str
torch_version: str
cuda: str | None
compiler: str
