# Completion of ferry for fish; load it with: ferry completion fish | source
function __ferry_complete
    set --local found (@FERRY@ complete -- (commandline --tokenize --cut-at-cursor --current-process) (commandline --current-token --cut-at-cursor) 2> /dev/null)
    if test "$found[1]" = ':files'
        __fish_complete_path (commandline --current-token --cut-at-cursor)
    else
        printf '%s\n' $found
    end
end
for name in @NAMES@
    complete --command $name --no-files --arguments '(__ferry_complete)'
end
