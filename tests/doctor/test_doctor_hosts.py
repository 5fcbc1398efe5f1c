"""``tp-embed doctor`` over several hosts."""

from __future__ import annotations

from doctor_command import DOCTOR, PATIENCE, Result
from hosts import IFNAME, hosts, require


def on_hosts(group, *options, env=None, port):
    """Runs it with one rank on each host."""
    jobs = []
    for rank, host in enumerate(group):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "WORLD_SIZE": str(len(group)),
            "MASTER_ADDR": group[0].address,
            "MASTER_PORT": str(port),
        }
        jobs.append(host.start([*DOCTOR, *options, "--json"], env={**place, **(env or {})}))
    codes = {job.wait(PATIENCE) for job in jobs}
    output = "".join(job.output for job in jobs)
    assert len(codes) == 1, output
    return Result(codes.pop(), output)


def test_nodes_are_examined_together(tmp_path):
    require()
    with hosts(2) as (a, b):
        # As Debian's installer has it.
        names = tmp_path / "etc_hosts"
        names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {b.name}\n")
        b.run(f"mount --bind {names} /etc/hosts")
        result = on_hosts([a, b], "--shared", str(a.local), port=29500)
        assert result.code == 1
        finding = result.find("resolves to 127.0.1.1", "error")
        assert finding["ranks"] == [1]
        assert finding["nodes"] == [b.name]
        assert f"GLOO_SOCKET_IFNAME={IFNAME}" in finding["fix"]
        assert result.find("is not the directory that rank 0 sees", "error")["ranks"] == [1]
        result.find("collectives were not timed", "note")

        fixed = {"GLOO_SOCKET_IFNAME": IFNAME}
        options = ("--tp", "2", "--shared", str(tmp_path))
        result = on_hosts([a, b], *options, env=fixed, port=29501)
        assert result.code == 0
        assert result.data["nodes"] == {a.name: [0], b.name: [1]}
        finding = result.find("the gang of ranks 0-1 crosses nodes (node1, node2)", "warning")
        assert "a tensor-parallel size of 1" in finding["fix"]
        assert f"{a.name} {a.address} ({IFNAME})" in result.find("2 nodes:", "ok")["what"]
        result.find("is one directory on all nodes", "ok")
        result.find("nodes reach each other", "ok")
        result.find("clocks differ by up to", "ok")
        result.find("neighbours between nodes send", "ok")
        seconds = result.data["seconds"]["0"]["world"]
        assert min(seconds["all_reduce 16777216"]) > min(seconds["all_reduce 4096"])


def test_nodes_that_do_not_reach_each_other_are_named():
    require()
    with hosts(2) as (a, b):
        # A firewall that lets the master port through.
        b.run("ip rule add ipproto tcp dport 30000-65534 prohibit")
        result = on_hosts([a, b], "--timeout", "30", port=29500)
        assert result.code == 1
        finding = result.find(f"{b.name} cannot reach {a.name} at {a.address}:", "error")
        assert finding["nodes"] == [a.name, b.name]
        result.find(f"{a.name} cannot reach {b.name} at {b.address}:", "error")
        result.find("collectives were not timed", "note")

        b.run("ip rule del ipproto tcp dport 30000-65534 prohibit")
        b.link_down()
        result = on_hosts([a, b], "--timeout", "6", port=29501)
        assert result.code == 1
        assert result.find("did not connect in 6 s", "error")["ranks"] == [1]
        assert f"rank 1 on {b.name}: error" in result.output
        assert f"rank 0 cannot be reached at {a.address}:29501 for 6 s" in result.output
