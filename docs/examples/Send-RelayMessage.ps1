# Queues a message on PostgreSQL and waits for its outcome, through ODBC (driver: psqlODBC).
#
#     ./Send-RelayMessage.ps1 -Database 'Driver={PostgreSQL Unicode(x64)};Server=db.contoso.com;Database=archive;Uid=ci' `
#         -From alice@contoso.com -To bob@contoso.com -Text 'Deploy finished'
#
# Exit code 0: delivered; 1: it ended otherwise, the reason is on stderr; 2: it has not ended within a minute.
param(
    [Parameter(Mandatory)] [string] $Database,
    [Parameter(Mandatory)] [string] $From,
    [Parameter(Mandatory)] [string] $To,
    [Parameter(Mandatory)] [string] $Text
)
$ErrorActionPreference = 'Stop'
$moving = 'queued', 'held', 'sending', 'sent'

$connection = [System.Data.Odbc.OdbcConnection]::new($Database)
$connection.Open()
try {
    $insert = $connection.CreateCommand()
    $insert.CommandText = 'INSERT INTO outbox (account, recipients, body) VALUES (?, ?, ?) RETURNING id'
    foreach ($value in $From, $To, $Text) { [void] $insert.Parameters.AddWithValue('', $value) }
    $id = $insert.ExecuteScalar()

    $ask = $connection.CreateCommand()
    $ask.CommandText = 'SELECT state, last_error FROM outbox WHERE id = ?'
    [void] $ask.Parameters.AddWithValue('', $id)
    $deadline = (Get-Date).AddMinutes(1)
    while ($true) {
        $row = $ask.ExecuteReader()
        [void] $row.Read()
        $state, $reason = $row['state'], $row['last_error']
        $row.Close()
        if ($state -notin $moving -or (Get-Date) -gt $deadline) { break }
        Start-Sleep -Milliseconds 200
    }
} finally {
    $connection.Close()
}
"row ${id}: $state"
if ($state -eq 'delivered') { exit 0 }
[Console]::Error.WriteLine("$(if ($reason -is [DBNull]) { 'nobody has said why' } else { $reason })")
exit $(if ($state -in $moving) { 2 } else { 1 })
