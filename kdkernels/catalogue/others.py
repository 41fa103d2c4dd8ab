"""Entries of the catalogue: other objectives of distillation, without kernels here."""

from __future__ import annotations

from kdkernels.catalogue.entry import Entry

__all__ = ["ENTRIES"]

NO_KERNEL = "no kernel of this library"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        key="hyper_sd",
        title="Hyper-SD: trajectory-segmented consistency",
        source="Ren et al. 2024, NeurIPS, arXiv 2404.13686",
        chapter="I",
        kind="outside",
        confidence="general",
        formula="d(f(x_n, t_n -> t_b), sg f(x^_m, t_m -> t_b)), t_b the end of t_n's segment, 8, 4, 2, then 1 of them",
        use="""\
network = torch.nn.Conv2d(4, 4, 3, padding=1)  # f, with times left out
noisy, stepped = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)  # x_n, and a step of the teacher's solver from it
with torch.no_grad():
    target = network(stepped)  # to the end of the segment
loss = torch.nn.functional.mse_loss(network(noisy), target)""",
        cost=NO_KERNEL,
        notes="The adversarial, reward and score terms are not here.",
    ),
    Entry(
        key="boot",
        title="BOOT: data-free distillation of diffusion models by bootstrapping",
        source="Gu et al. 2024, ICML, arXiv 2306.05544",
        chapter="I",
        kind="outside",
        confidence="paper",
        formula="(w / delta^2) |g(eps, s) - sg(y + delta lambda' (f(x^, t) - y))|^2, y = g(eps, t), s = t - delta; + boundary",
        use="""\
generator, denoiser = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)  # g and f, with times left out
noise, alpha, sigma, slope, delta = torch.randn(2, 3, 8, 8), 0.8, 0.6, 1.5, 0.05
with torch.no_grad():
    y = generator(noise)
    target = y + delta * slope * (denoiser(alpha * y + sigma * noise) - y)
    start = denoiser(noise)
loss = (generator(noise) - target).square().mean() / delta**2 + 0.1 * (generator(noise) - start).square().mean()""",
        cost=NO_KERNEL,
        notes="The equation is from the paper; weights are from memory.",
    ),
    Entry(
        key="msd_diffusion",
        title="MSD: several students for one diffusion model",
        source="Song et al. 2024, arXiv 2410.23274",
        chapter="I",
        kind="outside",
        confidence="general",
        formula="per student on its part of the data: gradient w (s_fake - s_real) dG (distribution matching) + GAN loss",
        use="""\
generator = torch.nn.Conv2d(3, 3, 1)
images = generator(torch.randn(2, 3, 8, 8))
fake_score, real_score = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
loss = 0.5 * (images - (images - (fake_score - real_score)).detach()).square().mean()""",
        cost=NO_KERNEL,
        notes="The gradient of the square is the difference of the scores. Four students; the GAN term is left out.",
    ),
    Entry(
        key="disback",
        title="DisBack: distribution backtracking",
        source="Zhang et al. 2024, arXiv 2408.15991",
        chapter="I",
        kind="outside",
        confidence="code",
        formula="0.5 |x - sg(x - g)|^2, g = (p_real - p_fake) / mean |p_real|, p = x - D(x + sigma eps)",
        use="""\
generator, real, fake = (torch.nn.Conv2d(3, 3, 1) for _ in range(3))  # real walks back along saved checkpoints
x = generator(torch.randn(2, 3, 8, 8))
with torch.no_grad():
    noisy = x + 0.5 * torch.randn_like(x)
    p_real, p_fake = x - real(noisy), x - fake(noisy)
    gradient = (p_real - p_fake) / p_real.abs().mean((1, 2, 3), keepdim=True)
loss = 0.5 * (x - (x - gradient).detach()).square().mean()""",
        cost=NO_KERNEL,
        notes="A schedule of teachers: the real one walks back along the checkpoints of its own degradation.",
    ),
    Entry(
        key="cat_adapter_training",
        title="CAT: contrastive adapter training",
        source="2024, CVPR workshops, arXiv 2404.07554",
        chapter="I",
        kind="outside",
        confidence="general",
        formula="noise error with the trigger + lam |eps_adapted - eps_base|^2 without it, lam about 1",
        use="""\
base, adapter = torch.nn.Conv2d(4, 4, 1), torch.nn.Conv2d(4, 4, 1)
noise, noisy, other = torch.randn(3, 2, 4, 8, 8).unbind()
learnt = torch.nn.functional.mse_loss(base(noisy) + adapter(noisy), noise)
kept = torch.nn.functional.mse_loss(base(other) + adapter(other), base(other).detach())
loss = learnt + 1.0 * kept""",
        cost=NO_KERNEL,
    ),
    Entry(
        key="krr_st",
        title="KRR-ST: self-supervised dataset distillation by kernel ridge regression",
        source="Lee et al. 2024, ICLR, arXiv 2310.06511",
        chapter="I",
        kind="outside",
        confidence="general",
        formula="0.5 |g(X_t) - K(X_t, X_s) (K(X_s, X_s) + lam I)^-1 Y_s|^2, K the kernel of features",
        use="""\
distilled, targets = torch.randn(5, 16, requires_grad=True), torch.randn(5, 24, requires_grad=True)
network = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU())
own, real = network(distilled), network(student_features.detach())
solved = torch.linalg.solve(own @ own.T + 1e-6 * torch.eye(5), targets)
loss = 0.5 * (teacher_features - real @ own.T @ solved).square().sum(-1).mean()""",
        cost=NO_KERNEL,
    ),
    Entry(
        key="expert_trajectory_dd",
        title="Dataset distillation along smooth expert trajectories",
        source="Shen et al. 2023, arXiv 2310.10541",
        chapter="I",
        kind="outside",
        confidence="general",
        formula="|theta_S,N - theta_E,t+M|^2 / |theta_E,t - theta_E,t+M|^2 after N steps on the distilled data",
        use="""\
data, answers = torch.randn(5, 16, requires_grad=True), torch.randint(50, (5,))
start, later = torch.randn(50, 16), torch.randn(50, 16)  # an expert's parameters
theta = start.clone().requires_grad_()
for _ in range(3):
    nll = torch.nn.functional.cross_entropy(data @ theta.T, answers)
    theta = theta - 0.1 * torch.autograd.grad(nll, theta, create_graph=True)[0]
loss = (theta - later).square().sum() / (start - later).square().sum()""",
        cost=NO_KERNEL,
        notes="Matching of intermediate states and the expert's own terms are not here.",
    ),
)
