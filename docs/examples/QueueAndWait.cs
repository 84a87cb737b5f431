// Queues a message on PostgreSQL and waits for its outcome, with Npgsql (dotnet add package Npgsql).
//
//     dotnet run -- "Host=db.contoso.com;Database=archive;Username=ci" alice@contoso.com bob@contoso.com "Deploy finished"
//
// Exit code 0: delivered; 1: it ended otherwise, the reason is on stderr; 2: it has not ended within a minute.
using Npgsql;

string[] moving = ["queued", "held", "sending", "sent"];
await using var source = NpgsqlDataSource.Create(args[0]);

await using var insert = source.CreateCommand(
    "INSERT INTO outbox (account, recipients, body) VALUES ($1, $2, $3) RETURNING id");
foreach (var value in args[1..4])
    insert.Parameters.AddWithValue(value);
var id = (long)(await insert.ExecuteScalarAsync())!;

var deadline = DateTime.UtcNow.AddMinutes(1);
while (true)
{
    await using var ask = source.CreateCommand("SELECT state, last_error FROM outbox WHERE id = $1");
    ask.Parameters.AddWithValue(id);
    await using var row = await ask.ExecuteReaderAsync();
    await row.ReadAsync();
    var state = row.GetString(0);
    if (!moving.Contains(state) || DateTime.UtcNow > deadline)
    {
        Console.WriteLine($"row {id}: {state}");
        if (state == "delivered")
            return 0;
        Console.Error.WriteLine(row.IsDBNull(1) ? "nobody has said why" : row.GetString(1));
        return moving.Contains(state) ? 2 : 1;
    }
    await Task.Delay(200);
}
